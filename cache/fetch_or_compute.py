"""Where each missing expert of a layer call is computed: brought to the device, or on the CPU where it lies. Pure."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from math import inf

_MAX_SEARCHED = 6  # experts up to which single moves and swaps are tried; beyond, an order and where to cut it


@dataclass(frozen=True, slots=True, kw_only=True)
class Missing:
    """One expert that is not on the device, and what each way of computing it takes, in seconds.

    `arrives_s`: from now, if it is on its way already; it then takes no more of the link. `cpu_s` is infinite where
    the CPU has no record of it.
    """

    device_s: float
    cpu_s: float
    fetch_s: float = 0.0
    arrives_s: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Busy:
    """From now until each is free for this call: the link, and the device, with what is there already."""

    link_s: float = 0.0
    device_s: float = 0.0
    cpu_s: float = 0.0  # and what it takes to hand the CPU anything at all


def finished_s(missing: Sequence[Missing], on_cpu: Collection[int], busy: Busy) -> float:
    """When the last product is there, if the CPU computes the experts of these indices and the others are fetched."""
    return max(_device_finished_s(missing, on_cpu, busy), _cpu_finished_s(missing, on_cpu, busy))


def choose_cpu(missing: Sequence[Missing], busy: Busy) -> frozenset[int]:
    """The indices of those that the CPU should compute, so that all are done soonest; ties leave it idle."""
    able = [i for i, expert in enumerate(missing) if expert.cpu_s < inf]
    starts = [frozenset[int]()]
    for order in (
        sorted(able, key=lambda i: missing[i].cpu_s),
        sorted(able, key=lambda i: missing[i].cpu_s / max(_off_device_s(missing[i]), 1e-12)),
    ):
        starts.append(_best_cut(missing, order, busy))
    if len(missing) <= _MAX_SEARCHED:
        starts = [_improved(missing, able, busy, start) for start in dict.fromkeys(starts)]
    return min(starts, key=lambda on_cpu: (finished_s(missing, on_cpu, busy), len(on_cpu)))


def fetch_order(missing: Sequence[Missing], on_cpu: Collection[int], busy: Busy) -> list[int]:
    """The indices of those that are to be fetched, in the order that `finished_s` has them."""
    return _fetches(missing, on_cpu, busy)[1]


def _device_finished_s(missing: Sequence[Missing], on_cpu: Collection[int], busy: Busy) -> float:
    """The device computes in the order of arrival."""
    return _fetches(missing, on_cpu, busy)[0]


def _fetches(missing: Sequence[Missing], on_cpu: Collection[int], busy: Busy) -> tuple[float, list[int]]:
    """When the device is done, and in which order the link carries what is fetched.

    What gains most from being early goes first (Johnson's rule for two machines in a row). That is no longer the best
    where others arrive between: then it is the better of this and the shortest first.
    """
    arrivals: list[tuple[float, float]] = []
    to_fetch: list[int] = []
    for i, expert in enumerate(missing):
        if i not in on_cpu:
            if expert.arrives_s is not None:
                arrivals.append((expert.arrives_s, expert.device_s))
            else:
                to_fetch.append(i)
    orders = [sorted(to_fetch, key=lambda i: _johnson((missing[i].fetch_s, missing[i].device_s)))]
    if arrivals and len(to_fetch) > 1:
        orders.append(sorted(to_fetch, key=lambda i: missing[i].fetch_s))
    return min(((_played_s(missing, order, arrivals, busy), order) for order in orders), key=lambda one: one[0])


def _played_s(
    missing: Sequence[Missing], order: Sequence[int], arrivals: Sequence[tuple[float, float]], busy: Busy
) -> float:
    """When the device is done, if these are fetched in that order beside what arrives by itself."""
    all_arrivals = list(arrivals)
    at = busy.link_s
    for i in order:
        at += missing[i].fetch_s
        all_arrivals.append((at, missing[i].device_s))
    done = busy.device_s
    for arrives_s, device_s in sorted(all_arrivals):
        done = max(done, arrives_s) + device_s
    return done


def _cpu_finished_s(missing: Sequence[Missing], on_cpu: Collection[int], busy: Busy) -> float:
    return busy.cpu_s + sum(missing[i].cpu_s for i in on_cpu) if on_cpu else 0.0


def _johnson(job: tuple[float, float]) -> tuple[bool, float]:
    """First those that the device takes longer with than the link, the soonest there first; then the others."""
    fetch_s, device_s = job
    return (False, fetch_s) if fetch_s <= device_s else (True, -device_s)


def _off_device_s(expert: Missing) -> float:
    """What the link and the device are spared if the CPU has it."""
    return expert.device_s + (expert.fetch_s if expert.arrives_s is None else 0.0)


def _best_cut(missing: Sequence[Missing], order: Sequence[int], busy: Busy) -> frozenset[int]:
    """How many of the first of `order` the CPU should have: more is later for it, and sooner for the others."""
    low, high = 0, len(order)
    while low < high:
        middle = (low + high) // 2
        on_cpu = frozenset(order[: middle + 1])
        if _device_finished_s(missing, on_cpu, busy) <= _cpu_finished_s(missing, on_cpu, busy):
            high = middle
        else:
            low = middle + 1
    cuts = [frozenset(order[:num]) for num in (low, low + 1)]
    return min(cuts, key=lambda on_cpu: finished_s(missing, on_cpu, busy))


def _improved(missing: Sequence[Missing], able: Sequence[int], busy: Busy, start: frozenset[int]) -> frozenset[int]:
    """By moving one expert, or swapping two, as long as that is sooner, or leaves who is not the last more time."""

    def cost(on_cpu: frozenset[int]) -> tuple[float, float]:
        times = _device_finished_s(missing, on_cpu, busy), _cpu_finished_s(missing, on_cpu, busy)
        return max(times), min(times)

    best, best_cost = start, cost(start)
    while True:
        moves = [best ^ {i} for i in able]
        moves += [best ^ {i, j} for i in able if i in best for j in able if j not in best]
        found_cost, found = min(
            ((cost(move), move) for move in moves), key=lambda one: one[0], default=((inf, inf), best)
        )
        if found_cost >= best_cost:
            return best
        best, best_cost = found, found_cost
