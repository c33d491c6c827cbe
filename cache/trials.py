"""Which of two ways to do the steps is faster, found out by turns that may cost no more than a share of the time."""

from __future__ import annotations

from collections import deque
from statistics import median

_SHARE = 0.015  # of the time that turns of the slower way may cost
_FIRST, _TURN, _REST = 4, 2, 8  # steps without at the start, of a trial, and at least between two
_WORTH = 0.95  # of the time without: what counts as faster, since steps vary by themselves
_ENOUGH, _RECENT = 4, 48  # times of a way to judge it by: at least, and at most


class Trials:
    """`is_on` is how the next step is to be done; `add` says how long it took."""

    def __init__(self) -> None:
        self.is_on = False
        self._best = False
        self._left = _FIRST  # steps until the next decision
        self._times: dict[bool, deque[float]] = {way: deque(maxlen=_RECENT) for way in (False, True)}
        self._total_s = 0.0
        self._spent_s = 0.0  # what trials took beyond what the better way would have taken

    def add(self, seconds: float) -> None:
        """A step has taken so long, for each of its rows."""
        if self.is_on != self._best:
            self._spent_s += seconds - median(self._times[self._best])
        self._total_s += seconds
        self._times[self.is_on].append(seconds)
        self._left -= 1
        if self._left == 0:
            self._decide()

    def _decide(self) -> None:
        other = self._times[not self._best]
        worth = 1.0 if self._best else _WORTH
        if len(other) >= _ENOUGH and median(other) < worth * median(self._times[self._best]):
            self._best, self._spent_s = not self._best, 0.0
            self.is_on, self._left = self._best, _REST
        elif self._spent_s <= _SHARE * self._total_s:
            self.is_on, self._left = not self._best, _TURN
        else:
            self.is_on, self._left = self._best, _REST
