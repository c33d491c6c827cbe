from __future__ import annotations

from itertools import combinations
from pathlib import Path

import numpy as np
import pytest

from cache.placement import Placement, balanced, imbalance, in_turn, load_placement
from cache.trace import RoutingTrace
from tests.cache.synthetic_traces import local_trace


def trace_of(ids: list[list[int]], num_experts: int) -> RoutingTrace:
    """One request, one layer."""
    array = np.asarray(ids, dtype=np.uint8)[:, None, :]
    return RoutingTrace(array, np.asarray([0, len(ids)]), np.asarray([0]), num_experts, layers=(0,), domains=("test",))


def test_every_rank_has_as_many_experts_give_or_take_one():
    trace = local_trace(0, [40], num_layers=3, num_experts=10, active=3)
    for placement in (in_turn(3, 10, 4), balanced(trace, 4, window=10)):
        placement.check(3, 10)
        for layer in placement.ranks:
            assert sorted(layer.count(rank) for rank in range(4)) == [2, 2, 3, 3]


def test_experts_that_are_busy_together_are_kept_apart():
    trace = trace_of([[0, 1], [0, 1], [2, 3], [2, 3]] * 8, 4)
    assert imbalance(trace, in_turn(1, 4, 2), window=2) == 2.0  # 0 and 1 are on one rank: it has all, the other nothing
    (layer,) = balanced(trace, 2, window=2).ranks
    assert layer[0] != layer[1]
    assert layer[2] != layer[3]
    assert imbalance(trace, balanced(trace, 2, window=2), window=2) == 1.0


def test_what_is_found_is_the_best_of_all_placements_of_a_small_model():
    trace = local_trace(3, [64], num_layers=1, num_experts=8, active=2)
    found = imbalance(trace, balanced(trace, 2, window=8), window=8)
    best = min(
        imbalance(trace, Placement(num_ranks=2, ranks=(tuple(int(e in chosen) for e in range(8)),)), window=8)
        for chosen in combinations(range(8), 4)
    )
    assert found <= 1.01 * best
    assert best < imbalance(trace, in_turn(1, 8, 2), window=8)


def test_without_time_to_solve_it_is_still_a_placement():
    trace = local_trace(0, [64], num_layers=2, num_experts=16, active=4)
    placement = balanced(trace, 4, window=8, time_limit_s=1e-3)
    placement.check(2, 16)
    assert imbalance(trace, placement, window=8) < imbalance(trace, in_turn(2, 16, 4), window=8)


def test_a_placement_is_kept_in_a_file(tmp_path: Path):
    placement = in_turn(2, 4, 2)
    placement.save(tmp_path / "p.json")
    assert load_placement(tmp_path / "p.json") == placement
    (tmp_path / "q.json").write_text("{}")
    with pytest.raises(ValueError, match=r"q\.json is no placement"):
        load_placement(tmp_path / "q.json")


def test_what_does_not_fit_is_refused():
    with pytest.raises(ValueError, match="4 experts cannot be spread over 5"):
        balanced(trace_of([[0]], 4), 5)
    with pytest.raises(ValueError, match="beyond its 2"):
        Placement(num_ranks=2, ranks=((0, 2),)).check(1, 2)
