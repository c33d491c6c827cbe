"""Measures a recorded workload: one trace in, one `Workload` out. Knows the measures, not how they are shown."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

from cache.analysis import Chosen, segment_cache_best_hit_rates, segment_routing_best_performance, specialisation_of
from cache.curve import Point, Verdict, hit_curve, sample_of, verdict
from cache.overlap import (
    Likeness,
    likeness,
    renamed,
    uniform_unique,
    unique_in_a_row,
    unique_of_requests,
    use_counts,
)
from cache.reuse import ReuseDistances, reuse_distances, working_sets
from cache.trace import RoutingTrace
from cache.workload import Batch, Judgement, Layer, Overlap, Reuse, SegmentCache, Size, WorkingSet, Workload

SET_LENGTHS = (1, 4, 16, 64, 256, 1024, 4096)  # tokens
BATCHES = (1, 2, 4, 8, 16, 32, 64)
_DRAWS = 256  # batches of each size
_MOST_COMPARED = 256  # requests, for their overlap
_REPLAY_CALLS = 30_000  # layer calls that are replayed by default


def measure(
    trace: RoutingTrace,
    *,
    window: int = 16,
    ratios: Sequence[float] = (1.0, 1.5, 2.0),
    sizes: Sequence[int],
    replay_tokens: int | None = None,
    concurrency: int = 1,
    seed: int = 0,
    progress: Callable[[str, int, int], None] = lambda what, done, total: None,
) -> Workload:
    """All measures of a trace, hit rates on a sample of it. Raises `ValueError` if no request has a window's tokens.

    `replay_tokens`: of the sample; by default as many as make 30,000 layer calls one by one, twice as many if several
    requests run at once.
    """
    rng = np.random.default_rng(seed)
    progress("measure", 0, 5)
    srp = segment_routing_best_performance(_sequences(trace), window)
    progress("measure", 1, 5)
    sch = segment_cache_best_hit_rates(_sequences(trace), window, ratios)
    progress("measure", 2, 5)
    by_domain = {
        name: use_counts(trace, [r for r, domain in enumerate(trace.domains) if domain == name]).sum(axis=0)
        for name in dict.fromkeys(trace.domains)
    }
    reuse = _reuse(reuse_distances(trace))
    progress("measure", 3, 5)
    lengths = [n for n in SET_LENGTHS if n <= int(np.diff(trace.seq_off).max(initial=0))]
    sets = _working_sets(trace, lengths)
    progress("measure", 4, 5)
    overlap, batches = _overlap(trace, rng), _batches(trace, rng)
    progress("measure", 5, 5)
    if replay_tokens is None:
        replay_tokens = max(1, min(2, concurrency) * _REPLAY_CALLS // len(trace.layers))  # a batch costs less a token
    sample, whole = sample_of(trace, replay_tokens, concurrency)
    points = hit_curve(sample, sizes, concurrency=concurrency, progress=progress)
    num_active = trace.ids.shape[2]
    return Workload(
        num_requests=trace.num_requests,
        num_tokens=trace.num_tokens,
        num_layers=len(trace.layers),
        num_experts=trace.num_experts,
        num_active=num_active,
        window=window,
        srp=srp,
        sch=[SegmentCache(ratio=ratio, hit_rate=rate) for ratio, rate in zip(ratios, sch, strict=True)],
        specialisation=specialisation_of(list(by_domain.values())) if len(by_domain) > 1 else None,
        layers=_layers(trace, np.sum(list(by_domain.values()), axis=0)),
        reuse=reuse,
        set_lengths=lengths,
        working_sets=sets,
        overlap=overlap,
        batches=batches,
        concurrency=concurrency,
        replayed_requests=sample.num_requests,
        replayed_tokens=sample.num_tokens,
        replayed_whole=whole,
        curve=[_size(point, trace.num_keys, num_active * len(trace.layers)) for point in points],
        judgement=_judgement(verdict(points)),
    )


def _sequences(trace: RoutingTrace) -> Iterator[Chosen]:
    for start, stop in zip(trace.seq_off[:-1], trace.seq_off[1:], strict=True):
        chosen = np.zeros((int(stop - start), len(trace.layers), trace.num_experts), dtype=np.bool_)
        np.put_along_axis(chosen, trace.ids[start:stop].astype(np.int64), True, axis=2)
        yield chosen


def _layers(trace: RoutingTrace, counts: NDArray[np.int64]) -> list[Layer]:
    """Counts [L, E] of all requests."""
    layers = []
    quarter = -(-trace.num_experts // 4)
    for layer, uses in zip(trace.layers, counts, strict=True):
        shares = uses / max(1, uses.sum())
        some = shares[shares > 0]
        layers.append(
            Layer(
                layer=layer,
                popularity=(uses / max(1, trace.num_tokens)).tolist(),
                top_expert=int(uses.argmax()),
                top_quarter=float(np.sort(shares)[::-1][:quarter].sum()),
                effective=float(np.exp(-(some * np.log(some)).sum())),
                unused=int((uses == 0).sum()),
            )
        )
    return layers


def _reuse(distances: ReuseDistances) -> Reuse:
    bins = distances.bins()
    shares, by_chance = distances.shares(bins)
    return Reuse(
        bin_ends=bins,
        shares=shares[:-1],
        shares_by_chance=by_chance[:-1],
        first=shares[-1],
        first_by_chance=by_chance[-1],
        percentiles={f"p{p}": distances.percentile(p / 100) for p in (50, 75, 90, 95, 99)},
    )


def _working_sets(trace: RoutingTrace, lengths: list[int]) -> list[WorkingSet]:
    first, whole = working_sets(trace, lengths)
    num_tokens = np.diff(trace.seq_off)
    sets = []
    for name in (None, *dict.fromkeys(trace.domains)):
        those = np.asarray([n > 0 and name in (None, d) for n, d in zip(num_tokens, trace.domains, strict=True)])
        if not those.any():
            continue
        long = [column[those & ~np.isnan(column)] for column in first.T]
        sets.append(
            WorkingSet(
                domain=name,
                num_requests=int(those.sum()),
                mean_tokens=float(num_tokens[those].mean()),
                first=[float(column.mean()) if len(column) else None for column in long],
                whole=float(whole[those].mean()),
            )
        )
    return sets


def _overlap(trace: RoutingTrace, rng: np.random.Generator) -> Overlap:
    used = np.flatnonzero(np.diff(trace.seq_off))
    num = min(len(used), _MOST_COMPARED)
    picked = [int(used[(2 * i + 1) * len(used) // (2 * num)]) for i in range(num)]
    counts = use_counts(trace, picked)
    domains = [trace.domains[r] for r in picked]
    seen, chance = likeness(counts, domains), likeness(renamed(counts, rng), domains)
    return Overlap(
        num_compared=num,
        domains=list(seen.domains),
        jaccard=_table(seen.jaccard),
        weighted=_table(seen.weighted),
        within=_means(seen, True),
        within_by_chance=_means(chance, True),
        between=_means(seen, False),
        between_by_chance=_means(chance, False),
    )


def _table(matrix: NDArray[np.float64]) -> list[list[float | None]]:
    return [[None if np.isnan(x) else float(x) for x in row] for row in matrix]


def _means(of: Likeness, same_domain: bool) -> dict[str, float | None]:
    return {"jaccard": of.mean(of.jaccard, same_domain), "weighted": of.mean(of.weighted, same_domain)}


def _batches(trace: RoutingTrace, rng: np.random.Generator) -> list[Batch]:
    return [
        Batch(
            num_tokens=num,
            of_requests=unique_of_requests(trace, num, _DRAWS, rng),
            in_a_row=unique_in_a_row(trace, num, _DRAWS, rng),
            uniform=uniform_unique(trace.num_experts, trace.ids.shape[2], num),
        )
        for num in BATCHES
    ]


def _size(point: Point, num_keys: int, active_keys: int) -> Size:
    phases = {
        name: [phase.hits / phase.queries if phase.queries else None for phase in (result.prefill, result.decode)]
        for name, result in point.results.items()
    }
    return Size(
        num_slots=point.num_slots,
        share=point.num_slots / num_keys,
        of_active=point.num_slots / active_keys,
        hit_rate={name: result.hit_rate for name, result in point.results.items()},
        prefill_hit_rate={name: phase[0] for name, phase in phases.items()},
        decode_hit_rate={name: phase[1] for name, phase in phases.items()},
    )


def _judgement(of: Verdict) -> Judgement:
    return Judgement(
        best_slots=of.best.num_slots,
        enough_slots=of.enough.num_slots,
        nothing_more=of.nothing_more,
        helps=of.helps,
        working_slots=None if of.working is None else of.working.num_slots,
    )
