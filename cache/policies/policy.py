"""What a replacement policy must offer. It sees bookkeeping only: keys, no bytes and no tensors."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

from cache.expert_key import ExpertKey


class Policy(Protocol):
    """Ranks the resident experts. Called under the cache's lock; each call O(log num_slots) or better, amortised."""

    def __init__(self, num_slots: int) -> None: ...

    def insert(self, key: ExpertKey) -> None:
        """An expert got a slot; it counts as used now."""

    def touch(self, key: ExpertKey) -> None:
        """A resident expert is used."""

    def remove(self, key: ExpertKey) -> None:
        """An expert lost its slot."""

    def victim(self, evictable: Callable[[ExpertKey], bool]) -> ExpertKey | None:
        """The resident expert to give up first among the evictable ones, None if there is none. Removes nothing."""
