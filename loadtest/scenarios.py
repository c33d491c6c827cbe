"""When requests are sent and what they are. A scenario is one class and one line in `SCENARIOS`, without locust.

With a rate the loop is open: requests are sent when they are due, whether or not earlier ones have been answered, as
independent clients do, so that a server that falls behind is seen to. Without one it is closed: so many users, each of
whom waits for an answer before asking again, and who ask less when the server is slow.
"""

from __future__ import annotations

import heapq
import random
from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

from loadtest.prompts import Prompts


@dataclass(frozen=True, slots=True, kw_only=True)
class Load:
    """How much of it; what a scenario has no use for it leaves alone."""

    duration_s: float = 60.0
    rate: float | None = None  # requests a second; None: a closed loop
    users: int = 8  # of a closed loop
    burst_size: int = 20
    burst_every_s: float = 10.0
    cancel_share: float | None = None  # of requests; None: as the scenario has it
    cancel_within_s: float = 2.0
    prompt_words: int = 2000  # of a long prompt

    def __post_init__(self) -> None:
        for name in ("duration_s", "rate", "users", "burst_size", "burst_every_s", "cancel_within_s", "prompt_words"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise ValueError(f"{name} must be above 0, not {value}")
        if self.cancel_share is not None and not 0 <= self.cancel_share <= 1:
            raise ValueError(f"cancel_share must be between 0 and 1, not {self.cancel_share}")


@dataclass(frozen=True, slots=True, kw_only=True)
class Ask:
    """One request: what is asked, and whether and when its client hangs up."""

    domain: str
    prompt: str
    cancel_after_s: float | None = None


class Scenario:
    """The steady one: the same load all the time. Others change a part of it."""

    default_cancel_share: ClassVar[float] = 0.0

    def __init__(self, load: Load, prompts: Prompts, rng: random.Random) -> None:
        self.load = load
        self.prompts = prompts
        self.rng = rng

    @property
    def is_open_loop(self) -> bool:
        return self.load.rate is not None

    def users_at(self, t: float) -> int:
        """Of a closed loop, `t` seconds after its beginning."""
        return self.load.users

    def rate_at(self, t: float) -> float:
        """Requests a second of an open loop; never above `load.rate`."""
        return self.load.rate or 0.0

    def arrivals(self) -> Iterator[float]:
        """Seconds from the beginning at which a request of an open loop is due: a Poisson process of `rate_at`."""
        if self.load.rate is None:
            return
        t = 0.0
        while True:
            t += self.rng.expovariate(self.load.rate)
            if t >= self.load.duration_s:
                return
            if self.rng.random() * self.load.rate < self.rate_at(t):
                yield t

    def ask(self) -> Ask:
        domain, prompt = self.pick()
        share = self.default_cancel_share if self.load.cancel_share is None else self.load.cancel_share
        is_cancelled = self.rng.random() < share
        cancel_after_s = self.rng.uniform(0, self.load.cancel_within_s) if is_cancelled else None
        return Ask(domain=domain, prompt=prompt, cancel_after_s=cancel_after_s)

    def pick(self) -> tuple[str, str]:
        """(domain, prompt); the domain is what the figures are kept apart by."""
        return "", self.prompts.pick(self.rng)[1]


class Steady(Scenario):
    pass


class Ramp(Scenario):
    """From nearly nothing to the full load, evenly: shows where latencies begin to grow."""

    def users_at(self, t: float) -> int:
        return max(1, min(self.load.users, 1 + int(self.load.users * t / self.load.duration_s)))

    def rate_at(self, t: float) -> float:
        return super().rate_at(t) * min(1.0, t / self.load.duration_s)


class Burst(Scenario):
    """Every `burst_every_s` a crowd of `burst_size` at one instant, over a steady rate if one is given."""

    @property
    def is_open_loop(self) -> bool:
        return True

    def arrivals(self) -> Iterator[float]:
        return heapq.merge(super().arrivals(), self._crowds())

    def _crowds(self) -> Iterator[float]:
        t = 0.0
        while t < self.load.duration_s:
            yield from [t] * self.load.burst_size
            t += self.load.burst_every_s


class Mixed(Scenario):
    """Prompts of all domains, by chance one after the other, and figures for each: they share few experts."""

    def pick(self) -> tuple[str, str]:
        return self.prompts.pick(self.rng)


class CancelStorm(Scenario):
    """Half of the clients hang up, at any moment up to `cancel_within_s`: in the queue, in prefill, in decode."""

    default_cancel_share = 0.5


class LongPrompts(Scenario):
    """Every prompt is long and new: prefill, not decode, is what the server is busy with."""

    def pick(self) -> tuple[str, str]:
        return "", self.prompts.long(self.rng, self.load.prompt_words)


SCENARIOS: dict[str, type[Scenario]] = {
    "steady": Steady,
    "ramp": Ramp,
    "burst": Burst,
    "mixed": Mixed,
    "cancel-storm": CancelStorm,
    "long-prompts": LongPrompts,
}
