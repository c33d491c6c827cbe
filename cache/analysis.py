"""How local the routing of a workload is, in the published measures. Knows which experts were chosen, nothing else."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Chosen = NDArray[np.bool_]  # [T, L, E]: whether token t used expert e of layer l; tokens of one sequence, in order


def segment_routing_best_performance(sequences: list[Chosen], window: int) -> float:
    """SRP(m): how well one fixed set of experts serves `window` tokens in a row; 1 if all use the same ones.

    With c(e, w) the tokens of window w that use expert e, a set {e: c >= t} has F1(t) = 2 sum(c where c >= t) /
    (m count(c >= t) + sum(c)); the best t over all windows (design, section 4). Sequences shorter than a window say
    nothing. Raises `ValueError` if all are.
    """
    of_count = np.zeros(window + 1, dtype=np.int64)  # how many (expert, window) have that count
    for chosen in sequences:
        if len(chosen) >= window:
            of_count += np.bincount(_window_counts(chosen, window).ravel(), minlength=window + 1)
    counts = np.arange(window + 1)
    total = int((of_count * counts).sum())
    if total == 0:
        raise ValueError(f"no sequence has {window} tokens")
    found = np.cumsum((of_count * counts)[::-1])[::-1][1:]  # for thresholds 1..m
    predicted = np.cumsum(of_count[::-1])[::-1][1:]
    return float((2 * found / (window * predicted + total)).max())


def segment_cache_best_hit_rate(sequences: list[Chosen], window: int, ratio: float) -> float:
    """SCH(m, rho): hit rate of a cache of `ratio` times one token's experts that knows the next `window` tokens.

    At each token the cache holds the experts with the most uses in the window that begins there, the most recently
    used first among equals (design, section 4).
    """
    hits = uses = 0
    for chosen in sequences:
        num_tokens, num_layers, num_experts = chosen.shape
        flat = chosen.reshape(num_tokens, num_layers * num_experts)
        per_token = float(flat.sum()) / num_tokens
        num_slots = min(round(ratio * per_token), flat.shape[1])
        sums = np.concatenate((np.zeros((1, flat.shape[1]), dtype=np.int64), np.cumsum(flat, axis=0)))
        last_use = np.full(flat.shape[1], -1, dtype=np.int64)
        for t in range(num_tokens):
            ahead = sums[min(t + window, num_tokens)] - sums[t]
            rank = ahead * (num_tokens + 1) + last_use + 1
            held = np.argpartition(-rank, num_slots - 1)[:num_slots] if num_slots < len(rank) else slice(None)
            hits += int(flat[t][held].sum())
            last_use[flat[t]] = t
        uses += int(flat.sum())
    if uses == 0:
        raise ValueError("no token uses an expert")
    return hits / uses


def popularity(sequences: list[Chosen]) -> NDArray[np.float64]:
    """Share of the tokens that use each expert [L, E]."""
    return np.asarray(np.concatenate(sequences).mean(axis=0), dtype=np.float64)


def specialisation(by_domain: dict[str, list[Chosen]]) -> float:
    """Mean over layers and domains of the total variation between a domain's use of experts and that of all: 0 to 1."""
    shares = np.stack([popularity(sequences) for sequences in by_domain.values()])  # [D, L, E]
    shares = shares / shares.sum(axis=-1, keepdims=True)
    return float(0.5 * np.abs(shares - shares.mean(axis=0)).sum(axis=-1).mean())


def _window_counts(chosen: Chosen, window: int) -> NDArray[np.int64]:
    """Tokens of each window that use each expert [T - window + 1, L, E]."""
    sums = np.cumsum(chosen, axis=0, dtype=np.int64)
    sums = np.concatenate((np.zeros_like(sums[:1]), sums))
    return np.asarray(sums[window:] - sums[:-window], dtype=np.int64)
