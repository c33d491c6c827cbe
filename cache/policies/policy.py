"""What a replacement policy must offer. It sees bookkeeping only: keys, routed tokens; no bytes and no tensors."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

from cache.expert_key import ExpertKey


class Policy(Protocol):
    """Ranks the resident experts. Called under the cache's lock; each call O(log num_slots) or better, amortised, and
    small vector work over one layer's experts.

    A key is inserted, touched any number of times and removed; experts not resident may be told of by `observe` only.
    """

    def __init__(self, num_slots: int, layers: Sequence[int], num_experts: int) -> None:
        """`layers`: the ids of the MoE layers in the order they run, not necessarily contiguous."""

    def insert(self, key: ExpertKey) -> None:
        """An expert got a slot; it counts as used now."""

    def touch(self, key: ExpertKey) -> None:
        """A resident expert is used."""

    def remove(self, key: ExpertKey) -> None:
        """An expert lost its slot."""

    def victim(self, evictable: Callable[[ExpertKey], bool], *, sparing: bool = False) -> ExpertKey | None:
        """The resident expert to give up first among the evictable ones, None if there is none. Removes nothing.

        `sparing`: the caller can do without, and none that `will_use` has named is evictable.
        """

    def will_use(self, keys: Sequence[Sequence[ExpertKey]]) -> None:
        """A step begins that is sure to use these, of each of its layers; each layer's hold until it is observed."""

    def observe(self, layer: int, requests: Sequence[int], chosen: Sequence[Sequence[int]], is_prefill: bool) -> None:
        """A layer call begins: token i of the step belongs to `requests[i]` and is routed to the experts `chosen[i]`.

        Called before the cache looks those experts up. `is_prefill`: the step has a prompt chunk in it; tokens of a
        request are in order, and a request with several is being prefilled. `chosen` does not change afterwards.
        """

    def ended(self, request: int) -> None:
        """The request is over; its share of any expectation leaves. One that was never observed is ignored."""
