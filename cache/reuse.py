"""When a request uses an expert again, and how many it has used by then. Knows routing, no cache and no policy."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from cache.trace import RoutingTrace


@dataclass(frozen=True, slots=True, eq=False)
class ReuseDistances:
    """Of each use of an expert by a layer: how many tokens ago the same request last had that layer use it.

    A token after the one that used it is 1. The first use by a request has no distance.
    """

    num_at: NDArray[np.int64]  # [longest request] uses at each distance; none at 0
    num_first: int
    by_chance: NDArray[np.float64]  # [longest request] expected uses if each token drew by the popularity alone

    @property
    def num_uses(self) -> int:
        return int(self.num_at.sum()) + self.num_first

    def percentile(self, share: float) -> int | None:
        """The least distance within which lies that share of the uses that have one; None where none has."""
        seen = np.cumsum(self.num_at)
        return int(np.searchsorted(seen, share * seen[-1])) if len(seen) and seen[-1] else None

    def bins(self) -> list[int]:
        """Ends of bins that double, the last containing the longest distance: 1, 2, 4 (3 and 4), 8 (5 to 8), ..."""
        longest = max(1, int(np.flatnonzero(self.num_at).max(initial=1)))
        return [1 << i for i in range((longest - 1).bit_length() + 1)]

    def shares(self, bins: list[int]) -> tuple[list[float], list[float]]:
        """Of all uses, those in each bin and lastly the first uses; and the same by chance."""
        return (_binned(self.num_at, bins, self.num_uses), _binned(self.by_chance, bins, self.num_uses))


def reuse_distances(trace: RoutingTrace) -> ReuseDistances:
    """Distances of all uses. By chance: each token uses each expert of a layer with its share of all tokens, alone.

    With p that share and n_r the tokens of request r, distance d has sum over r of max(0, n_r - d) times the sum over
    experts of p^2 (1 - p)^(d - 1) uses.
    """
    lengths = np.diff(trace.seq_off)
    longest = int(lengths.max(initial=0))
    num_at = np.zeros(longest + 1, dtype=np.int64)
    num_first, uses = 0, np.zeros(trace.num_keys, dtype=np.int64)
    for start, stop in zip(trace.seq_off[:-1], trace.seq_off[1:], strict=True):
        key, token = _uses(trace, int(start), int(stop))
        again = key[1:] == key[:-1]
        num_at += np.bincount((token[1:] - token[:-1])[again], minlength=longest + 1)
        num_first += len(key) - int(again.sum())
        uses += np.bincount(key, minlength=trace.num_keys)
    share = uses / max(1, trace.num_tokens)
    by_chance = np.zeros(longest + 1)
    pairs = np.cumsum(np.cumsum(np.bincount(lengths, minlength=longest + 2)[:0:-1]))[::-1]  # [d]: sum max(0, n_r - d)
    expected = share * share
    for d in range(1, longest):
        by_chance[d] = pairs[d] * expected.sum()
        expected *= 1.0 - share
    return ReuseDistances(num_at=num_at, num_first=num_first, by_chance=by_chance)


def working_sets(trace: RoutingTrace, lengths: list[int]) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
    """Distinct experts of all layers that each request uses, in its first so many tokens and in all of them.

    Returns [R, len(lengths)], not-a-number where a request is shorter, and [R].
    """
    first = np.full((trace.num_requests, len(lengths)), np.nan)
    whole = np.zeros(trace.num_requests, dtype=np.int64)
    for r in range(trace.num_requests):
        start, stop = int(trace.seq_off[r]), int(trace.seq_off[r + 1])
        key, token = _uses(trace, start, stop)
        began = np.sort(token[np.concatenate(([True], key[1:] != key[:-1]))[: len(key)]])
        whole[r] = len(began)
        for i, length in enumerate(lengths):
            if length <= stop - start:
                first[r, i] = np.searchsorted(began, length)
    return first, whole


def _uses(trace: RoutingTrace, start: int, stop: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Which expert of all layers (key) and in which token, ordered by key, then token; each pair once."""
    ids = trace.ids[start:stop].astype(np.int64)  # [n, L, k]
    key = ids + (np.arange(ids.shape[1]) * trace.num_experts)[None, :, None]
    pairs = np.sort((key * (stop - start) + np.arange(stop - start)[:, None, None]).ravel())
    pairs = pairs[np.concatenate(([True], pairs[1:] != pairs[:-1]))[: len(pairs)]]
    token: NDArray[np.int64]
    key, token = np.divmod(pairs, max(1, stop - start))
    return key, token


def _binned(num_at: NDArray[np.int64] | NDArray[np.float64], bins: list[int], total: int) -> list[float]:
    sums = np.concatenate(([0], np.cumsum(num_at[1:])))
    ends = np.minimum([0, *bins], len(num_at) - 1)
    inside = np.diff(sums[ends]) / max(1, total)
    return [*inside.tolist(), 1.0 - float(inside.sum())]
