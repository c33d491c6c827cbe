"""The measures of locality against their definitions spelt out, and on routings whose answer is known."""

from __future__ import annotations

import numpy as np
import pytest

from cache.analysis import (
    popularity,
    segment_cache_best_hit_rate,
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

        def key(e: int, t: int = t) -> tuple[int, int]:
            before = np.flatnonzero(flat[:t, e])
            return int(flat[t : t + m, e].sum()), int(before[-1]) if len(before) else -1

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


@pytest.mark.parametrize(("window", "ratio"), [(4, 1.0), (8, 1.5), (16, 2.0)])
def test_sch_is_its_definition_where_ranks_are_distinct(window: int, ratio: float):
    chosen = random_routing(60, 3)
    # equals in both keys are experts that were used last in the same token: any of them may be held
    assert segment_cache_best_hit_rate([chosen], window, ratio) == pytest.approx(
        sch_spelt_out(chosen, window, ratio), abs=0.03
    )


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
