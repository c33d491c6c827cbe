"""Trials cost little, find what is faster, and notice when that changes."""

from __future__ import annotations

import random

import pytest

from cache.trials import Trials


def run(
    trials: Trials, num_steps: int, times: dict[bool, float], noise: float = 0.0, seed: int = 0
) -> tuple[float, int]:
    """-> seconds that the steps took, and how many were on."""
    rng = random.Random(seed)
    total, num_on = 0.0, 0
    for _ in range(num_steps):
        seconds = times[trials.is_on] * rng.uniform(1 - noise, 1 + noise)
        total += seconds
        num_on += trials.is_on
        trials.add(seconds)
    return total, num_on


@pytest.mark.parametrize("slower", [1.05, 1.5, 4.0])
def test_a_way_that_is_slower_costs_no_more_than_two_percent_beyond_its_first_turn(slower: float):
    total, num_on = run(Trials(), 2000, {False: 1.0, True: slower})
    assert num_on >= 2
    assert total <= 2000 * 1.02 + 2 * (slower - 1)


@pytest.mark.parametrize("noise", [0.0, 0.2])
def test_a_way_that_is_faster_is_found_within_a_few_steps(noise: float):
    total, _ = run(Trials(), 400, {False: 1.0, True: 0.7}, noise)
    assert total < 0.76 * 400


def test_what_becomes_faster_later_is_noticed():
    trials = Trials()
    run(trials, 500, {False: 1.0, True: 1.5})
    _, num_on = run(trials, 500, {False: 1.0, True: 0.6})
    assert num_on > 250
    _, num_on = run(trials, 1000, {False: 1.0, True: 1.5})
    assert num_on < 300


@pytest.mark.parametrize("noise", [0.1, 0.4])
@pytest.mark.parametrize("slower", [1.02, 1.1, 1.3])
def test_noise_alone_does_not_cost_much(slower: float, noise: float):
    num_steps, seeds = 1000, range(8)
    num_on = sum(run(Trials(), num_steps, {False: 1.0, True: slower}, noise, seed)[1] for seed in seeds)
    assert num_on * (slower - 1) <= 0.04 * num_steps * len(seeds)
