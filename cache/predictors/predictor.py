"""What a predictor of routing must offer. It sees who asks, the tokens, and what a gate made of the layers so far."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

Scores = NDArray[np.float32]  # [D, T, E], larger is likelier; on a scale of its own that does not change with time


@dataclass(slots=True)
class View:
    """What is known at one point of a step of T tokens."""

    index: int  # the layer with experts that begins now; -1 before the first one
    requests: Sequence[int]  # [T]
    token_ids: Sequence[int]  # [T]
    gates: dict[str, NDArray[np.float32]] = field(default_factory=dict)  # [D, T, E] by name, for 1..D layers ahead


class Predictor(Protocol):
    """Foretells which experts coming layers will be asked for; learns from what they were."""

    name: str

    def scores(self, targets: slice, view: View) -> Scores | None:
        """Of the layers with experts in `targets`, the ones after the view's; None if it has nothing to say here."""

    def observe(self, index: int, view: View, chosen: NDArray[np.bool_]) -> None:
        """A layer was routed: chosen [T, E]."""

    def ended(self, request: int) -> None:
        """The request is over."""
