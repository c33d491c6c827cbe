"""Finds accesses of device memory that nothing puts in an order, by the happens-before relation. Runs nothing."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from cache.device.device import Region

Clock = dict[int, int]  # by stream: how many of its operations have happened before


def join(clock: Clock, other: Clock) -> None:
    """Into `clock`: what has happened before either."""
    for stream, count in other.items():
        if count > clock.get(stream, 0):
            clock[stream] = count


@dataclass(frozen=True, slots=True)
class _Access:
    begin: int
    end: int
    is_write: bool
    stream: int
    count: int  # of the operation in its stream
    what: str


class RaceDetector:
    """Told of every access when it is put into a stream, with the clock of its operation (Lamport, Mattern).

    Two accesses of which one writes, that overlap, must be ordered by a stream, an event, or a thread that waited for
    one before it went on; whether they did overlap in time this once does not matter.
    """

    def __init__(self) -> None:
        self.races: list[str] = []
        self._accesses: dict[int, list[_Access]] = {}  # by arena

    def access(self, region: Region, *, is_write: bool, stream: int, clock: Clock, what: str) -> None:
        """`clock[stream]` is the operation's own number."""
        now = _Access(region.offset, region.offset + region.nbytes, is_write, stream, clock[stream], what)
        kept = []
        for then in self._accesses.get(id(region.arena), ()):
            overlaps = then.begin < now.end and now.begin < then.end
            is_ordered = clock.get(then.stream, 0) >= then.count
            if overlaps and (now.is_write or then.is_write) and not is_ordered:
                self.races.append(f"{what} of [{now.begin}, {now.end}) is not ordered after {then.what}")
            # whoever is ordered after this access is so after those it replaces
            is_within = now.begin <= then.begin and then.end <= now.end
            replaces = is_within and is_ordered and (now.is_write or (not then.is_write and then.stream == stream))
            if not replaces:
                kept.append(then)
        kept.append(now)
        self._accesses[id(region.arena)] = kept

    def forget(self, arena: object) -> None:
        """Its memory was given back."""
        self._accesses.pop(id(arena), None)

    def check(self) -> None:
        """Raise `AssertionError` with the races found so far."""
        if self.races:
            raise AssertionError(_some(self.races))


def _some(races: Sequence[str]) -> str:
    more = f" (and {len(races) - 3} more)" if len(races) > 3 else ""
    return "; ".join(races[:3]) + more
