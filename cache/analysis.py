"""How local the routing of a workload is, in the published measures. Knows which experts were chosen, nothing else."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

_PART = 1 << 20  # numbers in a table at a time
Chosen = NDArray[np.bool_]  # [T, L, E]: whether token t used expert e of layer l; tokens of one sequence, in order


def segment_routing_best_performance(sequences: Iterable[Chosen], window: int) -> float:
    """SRP(m): how well one fixed set of experts serves `window` tokens in a row; 1 if all use the same ones.

    With c(e, w) the tokens of window w that use expert e, a set {e: c >= t} has F1(t) = 2 sum(c where c >= t) /
    (m count(c >= t) + sum(c)); the best t over all windows (design, section 4). Sequences shorter than a window say
    nothing. Raises `ValueError` if all are.
    """
    of_count = np.zeros(window + 1, dtype=np.int64)  # how many (expert, window) have that count
    for chosen in sequences:
        flat = chosen.reshape(len(chosen), chosen.shape[1] * chosen.shape[2])
        for start, stop in _parts(len(flat) - window + 1, flat.shape[1]):
            counts = _window_sums(flat[start : stop + window - 1], window, stop - start)
            of_count += np.bincount(counts.ravel(), minlength=window + 1)
    counts = np.arange(window + 1)
    total = int((of_count * counts).sum())
    if total == 0:
        raise ValueError(f"no sequence has {window} tokens")
    found = np.cumsum((of_count * counts)[::-1])[::-1][1:]  # for thresholds 1..m
    predicted = np.cumsum(of_count[::-1])[::-1][1:]
    return float((2 * found / (window * predicted + total)).max())


def segment_cache_best_hit_rate(sequences: Iterable[Chosen], window: int, ratio: float) -> float:
    """`segment_cache_best_hit_rates` of one ratio."""
    return segment_cache_best_hit_rates(sequences, window, [ratio])[0]


def segment_cache_best_hit_rates(sequences: Iterable[Chosen], window: int, ratios: Sequence[float]) -> list[float]:
    """SCH(m, rho): hit rates of caches of `ratios` times one token's experts that know the next `window` tokens.

    At each token the cache holds the experts with the most uses in the window that begins there, the most recently
    used first among equals (design, section 4), then those of lower layer and number. Raises `ValueError` if nothing
    is used.
    """
    hits, uses = [0] * len(ratios), 0
    for chosen in sequences:
        flat = chosen.reshape(len(chosen), chosen.shape[1] * chosen.shape[2])
        num_tokens, num_keys = flat.shape
        num_uses = int(flat.sum())
        uses += num_uses
        # The lowest rank that is still held, counted from below; num_keys where nothing is.
        lowest = [max(0, num_keys - round(ratio * num_uses / max(1, num_tokens))) for ratio in ratios]
        inside = sorted({at for at in lowest if at < num_keys})
        last_use = np.full(num_keys, -1, dtype=np.int64)
        for start, stop in _parts(num_tokens, num_keys):
            part = flat[start:stop]
            ahead = _window_sums(flat[start : stop + window - 1], window, stop - start)
            used_at = np.where(part, np.arange(start, stop)[:, None], -1)
            used_at = np.maximum.accumulate(np.concatenate((last_use[None], used_at)), axis=0)
            last_use = used_at[-1]
            rank = ahead * (num_tokens + 1) + used_at[:-1] + 1
            rank = rank * num_keys + np.arange(num_keys)[::-1]  # [n, keys], all different
            ordered = np.partition(rank, inside, axis=1) if inside else rank
            of_uses = rank[part]  # of each use, token by token
            per_token = part.sum(axis=1)
            for i, at in enumerate(lowest):
                if at < num_keys:
                    hits[i] += int((of_uses >= np.repeat(ordered[:, at], per_token)).sum())
    if uses == 0:
        raise ValueError("no token uses an expert")
    return [hit / uses for hit in hits]


def popularity(sequences: list[Chosen]) -> NDArray[np.float64]:
    """Share of the tokens that use each expert [L, E]."""
    return np.asarray(np.concatenate(sequences).mean(axis=0), dtype=np.float64)


def specialisation(by_domain: dict[str, list[Chosen]]) -> float:
    """Mean over layers and domains of the total variation between a domain's use of experts and that of all: 0 to 1."""
    return specialisation_of([popularity(sequences) for sequences in by_domain.values()])


def specialisation_of(uses: Sequence[NDArray[np.float64] | NDArray[np.int64]]) -> float:
    """The same of how much each domain uses each expert, in any unit, [L, E] of each."""
    shares = np.stack([of_domain / np.maximum(1e-9, of_domain.sum(axis=-1, keepdims=True)) for of_domain in uses])
    return float(0.5 * np.abs(shares - shares.mean(axis=0)).sum(axis=-1).mean())


def _parts(num_rows: int, num_columns: int) -> Iterator[tuple[int, int]]:
    """Ranges of rows whose tables fit in memory."""
    step = max(1, _PART // max(1, num_columns))
    return ((start, min(start + step, num_rows)) for start in range(0, num_rows, step))


def _window_sums(flat: NDArray[np.bool_], window: int, num_rows: int) -> NDArray[np.int64]:
    """Of each of the first `num_rows` rows, the sum of `window` rows from there, or of what is left [num_rows, N]."""
    sums = np.concatenate((np.zeros_like(flat[:1], dtype=np.int64), np.cumsum(flat, axis=0, dtype=np.int64)))
    ends = np.minimum(np.arange(num_rows) + window, len(flat))
    return np.asarray(sums[ends] - sums[:num_rows], dtype=np.int64)
