"""How often an engine that dies is started again. Pure: a clock and two numbers."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable


class Restarts:
    """Told of each death: at once after the first, later after the later ones, and not any more after too many."""

    def __init__(
        self,
        max_deaths: int = 5,
        within_s: float = 600.0,
        *,
        first_delay_s: float = 0.5,
        max_delay_s: float = 30.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """With the `max_deaths`-th death `within_s` seconds it is given up."""
        self._max_deaths = max_deaths
        self._within_s = within_s
        self._first_delay_s = first_delay_s
        self._max_delay_s = max_delay_s
        self._clock = clock
        self._deaths: deque[float] = deque()

    def delay_after_death(self) -> float | None:
        """It has died: seconds to wait before it is started again; None: it has died too often."""
        now = self._clock()
        self._deaths.append(now)
        while self._deaths[0] < now - self._within_s:
            self._deaths.popleft()
        before = len(self._deaths) - 1  # deaths in this time, but for this one
        if len(self._deaths) >= self._max_deaths:
            return None
        return 0.0 if before == 0 else min(self._max_delay_s, self._first_delay_s * 2.0 ** (before - 1))
