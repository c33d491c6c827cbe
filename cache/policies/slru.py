"""`slru`: segmented LRU. What was used once is given up before what was used again."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence
from itertools import chain

from cache.expert_key import ExpertKey

_PROTECTED_SHARE = 0.5  # of the slots; not tuned


class SlruPolicy:
    """Experts come into the probation list; a hit there moves them to the protected one, whose oldest fall back."""

    def __init__(self, num_slots: int, layers: Sequence[int], num_experts: int) -> None:
        self._max_protected = int(num_slots * _PROTECTED_SHARE)
        self._probation: OrderedDict[ExpertKey, None] = OrderedDict()  # oldest first, both
        self._protected: OrderedDict[ExpertKey, None] = OrderedDict()

    def insert(self, key: ExpertKey) -> None:
        self._probation[key] = None

    def touch(self, key: ExpertKey) -> None:
        if key in self._protected:
            self._protected.move_to_end(key)
            return
        del self._probation[key]
        self._protected[key] = None
        if len(self._protected) > self._max_protected:
            fallen, _ = self._protected.popitem(last=False)
            self._probation[fallen] = None

    def remove(self, key: ExpertKey) -> None:
        if key in self._protected:
            del self._protected[key]
        else:
            del self._probation[key]

    def victim(self, evictable: Callable[[ExpertKey], bool], *, sparing: bool = False) -> ExpertKey | None:
        return next((key for key in chain(self._probation, self._protected) if evictable(key)), None)

    def will_use(self, keys: Sequence[Sequence[ExpertKey]]) -> None:
        pass

    def observe(self, layer: int, requests: Sequence[int], chosen: Sequence[Sequence[int]], is_prefill: bool) -> None:
        pass

    def ended(self, request: int) -> None:
        pass
