"""The name of an expert at rest."""

from __future__ import annotations

from typing import NamedTuple


class ExpertKey(NamedTuple):
    """Where an expert is stored: its layer and its index there. Which router output means it is the model's affair."""

    layer: int
    expert: int

    @property
    def record_name(self) -> str:
        return f"layers.{self.layer}.experts.{self.expert}"
