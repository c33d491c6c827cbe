"""The measures of locality against their definitions spelt out, and on routings whose answer is known."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import cache.analysis
from cache.analysis import (
    popularity,
    segment_cache_best_hit_rate,
    segment_cache_best_hit_rates,
    segment_routing_best_performance,
    specialisation,
)


def random_routing(
    num_tokens: int, seed: int, num_layers: int = 2, num_experts: int = 6, active: int = 2
) -> np.ndarray:
    """Routing with some locality: a token keeps an expert of the one before with probability one half."""
    generator = np.random.default_rng(seed)
    chosen = np.zeros((num_tokens, num_layers, num_experts), dtype=bool)
    for t in range(num_tokens):
        for layer in range(num_layers):
            scores = generator.random(num_experts) + (0.5 * chosen[t - 1, layer] if t else 0)
            chosen[t, layer, np.argsort(-scores)[:active]] = True
    return chosen


def srp_spelt_out(sequences: list[np.ndarray], m: int) -> float:
    best = 0.0
    for t in range(1, m + 1):
        found = predicted = total = 0
        for chosen in sequences:
            for start in range(len(chosen) - m + 1):
                for c in chosen[start : start + m].sum(axis=0).ravel():
                    total += c
                    if c >= t:
                        found += c
                        predicted += 1
        best = max(best, 2 * found / (m * predicted + total))
    return best


def sch_spelt_out(chosen: np.ndarray, m: int, ratio: float) -> float:
    flat = chosen.reshape(len(chosen), -1)
    slots = round(ratio * flat.sum() / len(flat))
    hits = 0
    for t, row in enumerate(flat):

        def key(e: int, t: int = t) -> tuple[int, int, int]:
            before = np.flatnonzero(flat[:t, e])
            return int(flat[t : t + m, e].sum()), int(before[-1]) if len(before) else -1, -e

        held = sorted(range(flat.shape[1]), key=key, reverse=True)[:slots]
        hits += int(row[held].sum())
    return hits / int(flat.sum())


@pytest.mark.parametrize("window", [1, 4, 16])
def test_srp_is_its_definition(window: int):
    sequences = [random_routing(30, 0), random_routing(17, 1), random_routing(3, 2)]
    usable = [chosen for chosen in sequences if len(chosen) >= window]
    assert segment_routing_best_performance(sequences, window) == pytest.approx(srp_spelt_out(usable, window))


def test_srp_of_routing_that_never_changes_is_one_and_less_of_one_that_does():
    same = np.repeat(random_routing(1, 0), 40, axis=0)
    assert segment_routing_best_performance([same], 16) == pytest.approx(1.0)
    assert segment_routing_best_performance([random_routing(40, 0)], 16) < 0.9
    with pytest.raises(ValueError, match="no sequence has 16 tokens"):
        segment_routing_best_performance([same[:15]], 16)


@given(st.integers(1, 40), st.integers(0, 99), st.integers(1, 20), st.sampled_from([0.1, 1.0, 1.5, 2.0, 2.9, 9.0]))
@settings(max_examples=40, deadline=None)
def test_sch_is_its_definition(num_tokens: int, seed: int, window: int, ratio: float):
    chosen = random_routing(num_tokens, seed)
    found = segment_cache_best_hit_rates([chosen], window, [2.0, ratio])
    assert found == pytest.approx([sch_spelt_out(chosen, window, 2.0), sch_spelt_out(chosen, window, ratio)])


def test_srp_and_sch_by_hand():
    # one layer of three experts, one a token: 0 0 1 2
    chosen = np.eye(3, dtype=bool)[[0, 0, 1, 2]][:, None]
    # windows of two: {0: 2}, {0: 1, 1: 1}, {1: 1, 2: 1}; t = 1 predicts 5 of 6 uses by 5 experts, t = 2 two by one
    assert segment_routing_best_performance([chosen], 2) == pytest.approx(max(2 * 6 / (2 * 5 + 6), 2 * 2 / (2 * 1 + 6)))
    # one slot, two ahead: 0; 0, as often used as 1 and more recently; 1, the lower of two never used; 2
    assert segment_cache_best_hit_rate([chosen], 2, 1.0) == 1.0
    # 1 2 2 0, three ahead: 2, which is used twice, displaces 1 in the first token
    later = np.eye(3, dtype=bool)[[1, 2, 2, 0]][:, None]
    assert segment_cache_best_hit_rate([later], 3, 1.0) == pytest.approx(3 / 4)


def test_tables_in_parts_give_what_whole_ones_do(monkeypatch: pytest.MonkeyPatch):
    sequences = [random_routing(50, 0), random_routing(33, 1)]
    whole = segment_routing_best_performance(sequences, 8), segment_cache_best_hit_rates(sequences, 8, [1.0, 2.0])
    monkeypatch.setattr(cache.analysis, "_PART", 40)  # three tokens
    parts = segment_routing_best_performance(sequences, 8), segment_cache_best_hit_rates(sequences, 8, [1.0, 2.0])
    assert parts == whole


def test_a_cache_of_everything_always_hits_and_one_that_sees_only_the_token_holds_its_experts():
    chosen = random_routing(30, 4)
    assert segment_cache_best_hit_rate([chosen], 16, 100.0) == 1.0
    assert segment_cache_best_hit_rate([chosen], 1, 1.0) == 1.0
    assert segment_cache_best_hit_rate([chosen], 16, 1.0) < 1.0
    with pytest.raises(ValueError, match="no token uses an expert"):
        segment_cache_best_hit_rate([np.zeros((4, 1, 2), dtype=bool)], 2, 1.0)


def test_popularity_and_specialisation():
    left, right = np.zeros((10, 1, 4), dtype=bool), np.zeros((10, 1, 4), dtype=bool)
    left[:, 0, :2] = right[:, 0, 2:] = True
    assert popularity([left, right]).tolist() == [[0.5, 0.5, 0.5, 0.5]]
    assert specialisation({"a": [left], "b": [right]}) == pytest.approx(0.5)
    assert specialisation({"a": [left], "b": [left]}) == 0.0
