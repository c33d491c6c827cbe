"""How alike requests are in their experts, and how many a batch of their tokens uses. Knows routing, nothing else."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from cache.trace import RoutingTrace

Matrix = NDArray[np.float64]


@dataclass(frozen=True, slots=True, eq=False)
class Likeness:
    """Means over pairs of different requests, a row and a column for each domain; not-a-number without a pair.

    `jaccard`: distinct experts of all layers that both use / that either uses. `weighted`: of the uses by a layer, the
    share that falls on the same experts in the same proportion, sum over experts of the lesser share, mean over layers.
    """

    domains: tuple[str, ...]
    num_requests: tuple[int, ...]  # that were compared, of each domain
    jaccard: Matrix  # [D, D]
    weighted: Matrix  # [D, D]
    num_pairs: NDArray[np.int64]  # [D, D]

    def mean(self, measure: Matrix, same_domain: bool) -> float | None:
        """Over all pairs within domains, or between them; None without a pair."""
        among = np.eye(len(self.domains), dtype=bool) == same_domain
        num = int(self.num_pairs[among].sum())
        return float(np.nansum(np.where(among, measure * self.num_pairs, 0.0))) / num if num else None


def use_counts(trace: RoutingTrace, requests: list[int]) -> NDArray[np.int64]:
    """Uses of each expert by each of the requests [R, L, E]."""
    num_layers, num_experts = len(trace.layers), trace.num_experts
    layer = (np.arange(num_layers) * num_experts)[None, :, None]
    rows = [trace.ids[trace.seq_off[r] : trace.seq_off[r + 1]].astype(np.int64) + layer for r in requests]
    counts = [np.bincount(row.ravel(), minlength=trace.num_keys) for row in rows]
    return np.asarray(counts, dtype=np.int64).reshape(len(requests), num_layers, num_experts)


def likeness(counts: NDArray[np.int64], domains: list[str]) -> Likeness:
    """Compare requests by their counts [R, L, E]; `domains` names the domain of each."""
    num = len(counts)
    names = tuple(dict.fromkeys(domains))
    member = np.asarray([[domain == name for name in names] for domain in domains], dtype=np.float64)  # [R, D]
    member = member.reshape(num, len(names))
    shares = counts / np.maximum(1, counts.sum(axis=2, keepdims=True))
    flat = shares.reshape(num, -1).astype(np.float32)
    used = (flat > 0).astype(np.float32)
    both = used @ used.T
    either = used.sum(axis=1)[:, None] + used.sum(axis=1)[None, :] - both
    jaccard = both / np.maximum(1.0, either)
    weighted = np.stack([np.minimum(row, flat).sum(axis=1) for row in flat]) / counts.shape[1] if num else both
    others = 1.0 - np.eye(num)
    num_pairs = member.T @ others @ member  # both ways round, on and off the diagonal alike
    with np.errstate(invalid="ignore"):
        means = [(member.T @ (measure * others) @ member) / num_pairs for measure in (jaccard, weighted)]
    sizes = tuple(int(size) for size in member.sum(axis=0))
    return Likeness(names, sizes, means[0], means[1], np.rint(num_pairs).astype(np.int64))


def renamed(counts: NDArray[np.int64], rng: np.random.Generator) -> NDArray[np.int64]:
    """The counts with the experts of each layer and request in random order: as many, as skewed, alike by chance."""
    return np.asarray(rng.permuted(counts, axis=2), dtype=np.int64)


def uniform_unique(num_experts: int, num_active: int, num_tokens: int) -> float:
    """Distinct experts that so many tokens use if each draws its own uniformly: E (1 - (1 - k / E)^B)."""
    return num_experts * (1.0 - (1.0 - num_active / num_experts) ** num_tokens)


def unique_of_requests(trace: RoutingTrace, num_tokens: int, draws: int, rng: np.random.Generator) -> float | None:
    """Mean distinct experts of a layer in a batch of one token each of so many requests; None with fewer requests.

    Requests are drawn alike, without repetition, then a token of each.
    """
    lengths = np.diff(trace.seq_off)
    usable = np.flatnonzero(lengths > 0)
    if len(usable) < num_tokens:
        return None
    picked = np.stack([rng.permutation(usable)[:num_tokens] for _ in range(draws)])  # [draws, B]
    return _mean_unique(trace, trace.seq_off[picked] + rng.integers(0, lengths[picked]))


def unique_in_a_row(trace: RoutingTrace, num_tokens: int, draws: int, rng: np.random.Generator) -> float | None:
    """The same of tokens that follow each other in one request, all places alike; None where none is so long."""
    places = np.maximum(0, np.diff(trace.seq_off) - num_tokens + 1)  # of each request
    if not places.sum():
        return None
    ends = np.cumsum(places)
    place = rng.integers(0, ends[-1], size=draws)
    request = np.searchsorted(ends, place, side="right")
    first = trace.seq_off[request] + place - (ends - places)[request]
    return _mean_unique(trace, first[:, None] + np.arange(num_tokens))


def _mean_unique(trace: RoutingTrace, rows: NDArray[np.int64]) -> float:
    """Rows [draws, B] of the trace -> distinct experts of a layer, mean over draws and layers."""
    num_layers = len(trace.layers)
    layer = (np.arange(num_layers) * trace.num_experts)[None, :, None]
    total = sum(len(np.unique(trace.ids[batch].astype(np.int64) + layer)) for batch in rows)
    return total / (len(rows) * num_layers)
