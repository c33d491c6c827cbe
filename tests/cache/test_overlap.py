"""How alike requests are and what batches use: by hand, and against loops that spell out what they are."""

from __future__ import annotations

import math

import numpy as np
import pytest

from cache.overlap import likeness, renamed, uniform_unique, unique_in_a_row, unique_of_requests, use_counts
from tests.cache.synthetic_traces import random_trace, trace_of


def test_likeness_by_hand():
    # one layer of four experts: the first two requests share expert 1, the third is like the first
    counts = np.asarray([[[2, 2, 0, 0]], [[0, 1, 3, 0]], [[1, 1, 0, 0]]])
    found = likeness(counts, ["x", "y", "x"])
    assert found.domains == ("x", "y")
    assert found.num_requests == (2, 1)
    assert found.jaccard[0].tolist() == pytest.approx([1.0, 1 / 3])
    assert found.weighted[0].tolist() == pytest.approx([1.0, 1 / 4])
    assert np.isnan(found.jaccard[1, 1])  # one request has no pair
    assert found.mean(found.weighted, same_domain=True) == pytest.approx(1.0)
    assert found.mean(found.weighted, same_domain=False) == pytest.approx(0.25)
    alone = likeness(counts[:1], ["x"])
    assert alone.mean(alone.jaccard, same_domain=True) is None


def test_likeness_is_the_mean_over_pairs_of_what_loops_count():
    lengths, domains = [5, 9, 2, 7, 4], ["a", "b", "a", "b", "a"]
    counts = use_counts(random_trace(3, lengths), list(range(5)))
    assert counts.sum(axis=(1, 2)).tolist() == [length * 3 * 2 for length in lengths]
    found = likeness(counts, domains)
    for x, first in enumerate("ab"):
        for y, second in enumerate("ab"):
            jaccard, weighted = [], []
            for i in range(5):
                for j in range(5):
                    if i == j or (domains[i], domains[j]) != (first, second):
                        continue
                    one, two = counts[i] > 0, counts[j] > 0
                    jaccard.append((one & two).sum() / (one | two).sum())
                    layers = zip(counts[i], counts[j], strict=True)
                    weighted.append(np.mean([np.minimum(p / p.sum(), q / q.sum()).sum() for p, q in layers]))
            assert found.num_pairs[x, y] == len(jaccard)
            assert found.jaccard[x, y] == pytest.approx(np.mean(jaccard), abs=1e-6)
            assert found.weighted[x, y] == pytest.approx(np.mean(weighted), abs=1e-6)


def test_renamed_experts_are_as_many_and_as_skewed_and_requests_no_longer_alike():
    counts = np.tile(np.asarray([9, 5, 0, 0, 0, 0, 0, 0, 0, 0]), (20, 4, 1))
    other = renamed(counts, np.random.default_rng(0))
    assert (np.sort(other, axis=2) == np.sort(counts, axis=2)).all()
    assert (likeness(counts, ["x"] * 20).weighted == 1.0).all()
    by_chance = sum(min(p, q) for p in (9 / 14, 5 / 14) for q in (9 / 14, 5 / 14)) / 10
    assert likeness(other, ["x"] * 20).weighted[0, 0] == pytest.approx(by_chance, abs=0.03)


@pytest.mark.parametrize("active", [1, 3, 8])
def test_uniform_unique_is_what_uniform_routing_uses(active: int):
    assert uniform_unique(8, active, 1) == pytest.approx(active)
    assert uniform_unique(8, 8, 5) == pytest.approx(8)
    assert uniform_unique(8, active, 64) == pytest.approx(8, abs=0.01)
    trace = random_trace(0, [1] * 400, num_layers=4, num_experts=8, active=active)
    drawn = unique_of_requests(trace, 4, 400, np.random.default_rng(1))
    assert drawn == pytest.approx(uniform_unique(8, active, 4), abs=0.1)


def test_a_batch_takes_a_token_of_each_of_different_requests():
    ids = np.asarray([0, 0, 1, 2, 3]).reshape(-1, 1, 1)
    trace = trace_of(ids, [2, 1, 0, 1, 1], 4)
    rng = np.random.default_rng(0)
    assert unique_of_requests(trace, 4, 8, rng) == 4.0  # never both tokens of the first, nor the empty one
    assert unique_of_requests(trace, 5, 8, rng) is None


def test_a_batch_in_a_row_stays_within_a_request():
    trace = trace_of(np.asarray([0, 1, 0, 1, 2, 2]).reshape(-1, 1, 1), [4, 2], 3)
    rng = np.random.default_rng(0)
    assert unique_in_a_row(trace, 3, 32, rng) == 2.0
    assert unique_in_a_row(trace, 2, 4000, rng) == pytest.approx((3 * 2 + 1) / 4, abs=0.05)
    assert unique_in_a_row(trace, 5, 32, rng) is None
    assert math.isclose(unique_in_a_row(trace, 1, 16, rng) or 0, 1.0)
