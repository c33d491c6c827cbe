"""Hit rate over cache size on a sample of a trace, and where it stops to pay. Knows the replay, no bytes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np

from cache.replay import ReplayResult, replay
from cache.trace import RoutingTrace, concatenate

POLICIES = ("lru", "segment", "belady")
_DECIDES = "segment"  # whose curve is judged
_LITTLE = 0.02  # of the queries, gained by twice the cache: not worth it
_NOTHING = 0.005
_HELPS = 0.05  # hits beyond the share of the experts that are held


@dataclass(frozen=True, slots=True)
class Point:
    """A cache size. Rates are of all queries, by policy."""

    num_slots: int
    results: dict[str, ReplayResult]

    @property
    def hit_rate(self) -> float:
        return self.results[_DECIDES].hit_rate


@dataclass(frozen=True, slots=True)
class Verdict:
    """What a curve says. `best` is where it stands highest over the line that a cache of random experts would follow.

    `enough` is the smallest size from which on twice the cache gains less than two in a hundred queries, and so is
    every larger one; `nothing_more` says that all experts gain less than half of one.
    """

    best: Point
    enough: Point
    nothing_more: bool
    helps: bool  # somewhere better than a cache of random experts by five in a hundred
    working: Point | None  # the smallest at which LRU hits at all, if not the first


def sample_of(trace: RoutingTrace, num_tokens: int, concurrency: int = 1) -> tuple[RoutingTrace, bool]:
    """Whole requests spread evenly over the trace, of so many tokens at most; all of them where they fit.

    At least as many requests as run at once, if there are. Where these are too long, the beginning of each, and not
    whole (the second of what is returned).
    """
    used = [r for r in range(trace.num_requests) if trace.seq_off[r + 1] > trace.seq_off[r]]
    if trace.num_tokens <= num_tokens:
        return trace, True
    least = min(len(used), concurrency)
    num = max(least, len(used) * num_tokens // trace.num_tokens)
    while True:
        picked = [used[(2 * i + 1) * len(used) // (2 * num)] for i in range(num)]
        lengths = [int(trace.seq_off[r + 1] - trace.seq_off[r]) for r in picked]
        if sum(lengths) <= num_tokens or num <= least:
            break
        num -= 1
    longest = max(1, num_tokens // num) if sum(lengths) > num_tokens else max(lengths)
    return concatenate([_beginning(trace.select(r, r + 1), longest) for r in picked]), max(lengths) <= longest


def _beginning(request: RoutingTrace, num_tokens: int) -> RoutingTrace:
    if request.num_tokens <= num_tokens:
        return request
    return replace(
        request,
        ids=request.ids[:num_tokens],
        seq_off=np.asarray([0, num_tokens], dtype=np.int64),
        num_prompt=np.minimum(request.num_prompt, num_tokens),
        token_ids=None if request.token_ids is None else request.token_ids[:num_tokens],
    )


def hit_curve(
    trace: RoutingTrace,
    sizes: Sequence[int],
    *,
    concurrency: int = 1,
    progress: Callable[[str, int, int], None] = lambda what, done, total: None,
) -> list[Point]:
    """Replay at each size, ascending, and with room for all experts, from an empty cache."""
    points: list[Point] = []
    ascending = sorted({*sizes, trace.num_keys})
    for i, num_slots in enumerate(ascending):
        results = {}
        for j, name in enumerate(POLICIES):
            progress("replay", i * len(POLICIES) + j, len(ascending) * len(POLICIES))
            results[name] = replay(trace, name, num_slots, concurrency=concurrency)
        points.append(Point(num_slots, results))
    progress("replay", len(ascending) * len(POLICIES), len(ascending) * len(POLICIES))
    return points


def verdict(points: Sequence[Point]) -> Verdict:
    """Judge a curve whose last point has room for all experts."""
    sizes = np.asarray([point.num_slots for point in points], dtype=np.float64)
    rates = np.asarray([point.hit_rate for point in points])
    above = rates - rates[-1] * sizes / sizes[-1]
    doubled = np.interp(np.minimum(2 * sizes, sizes[-1]), sizes, rates)
    paying = np.flatnonzero(doubled - rates >= _LITTLE)  # the sizes that are worth doubling
    enough = int(paying[-1]) + 1 if len(paying) else 0
    hitting = [i for i, point in enumerate(points) if point.results["lru"].hit_rate > 0.01]
    first = hitting[0] if hitting else len(points) - 1
    return Verdict(
        best=points[int(above.argmax())],
        enough=points[enough],
        nothing_more=bool(rates[-1] - rates[enough] < _NOTHING),
        helps=bool((above > _HELPS).any()),
        working=points[first] if first else None,
    )
