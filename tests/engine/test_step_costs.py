from __future__ import annotations

import random

import pytest

from engine.step_costs import StepCosts


def test_what_a_step_is_made_of_is_found():
    costs = StepCosts()
    rng = random.Random(0)
    for _ in range(300):
        rows, tokens = rng.randrange(1, 33), rng.choice((0, 0, 64, 300, 512))
        costs.add(rows, tokens, 0.02 + 0.001 * rows + (0.3 + 0.002 * tokens if tokens else 0.0))
    assert costs.seconds(20, 0) == pytest.approx(0.04, rel=0.05)
    assert costs.seconds(10, 400) == pytest.approx(0.03 + 0.3 + 0.8, rel=0.05)
    assert costs.stream_s == pytest.approx(0.3, rel=0.1)
    assert costs.prompt_token_s == pytest.approx(0.002, rel=0.05)


def test_a_machine_that_changes_is_followed():
    costs = StepCosts()
    for i in range(400):
        rows = 1 + i % 16
        costs.add(rows, 0, (0.01 if i < 200 else 0.03) * rows)
    assert costs.seconds(10, 0) == pytest.approx(0.3, rel=0.05)


def test_nothing_costs_less_than_nothing():
    costs = StepCosts()
    rng = random.Random(1)
    for _ in range(100):
        rows, tokens = rng.randrange(1, 20), rng.randrange(0, 3) * 100
        costs.add(rows, tokens, max(0.0, 0.5 - 0.01 * rows) + rng.random() * 0.1)
        assert costs.stream_s >= 0
        assert costs.prompt_token_s >= 0
        assert costs.seconds(0, 0) >= 0


def test_it_says_when_it_knows():
    costs = StepCosts()
    assert not costs.knows_decoding
    for _ in range(8):
        costs.add(3, 0, 0.1)
    assert costs.knows_decoding
    assert not costs.knows_prompts
    assert costs.seconds(3, 0) == pytest.approx(0.1, rel=0.02)
