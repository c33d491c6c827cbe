"""loadtest/scenarios.py: when requests are due, and which are cancelled."""

from __future__ import annotations

import random
import statistics
from itertools import pairwise
from typing import Any

import pytest

from loadtest.prompts import Prompts
from loadtest.scenarios import SCENARIOS, Load, Scenario

PROMPTS = Prompts({"a": ["one two three", "four"], "b": ["five"]})


def scenario(name: str, **load: Any) -> Scenario:
    return SCENARIOS[name](Load(**load), PROMPTS, random.Random(3))


@pytest.mark.parametrize("name", SCENARIOS)
def test_every_scenario_has_something_to_ask_and_a_time_for_it(name: str) -> None:
    closed, opened = scenario(name, duration_s=100.0, users=8), scenario(name, duration_s=100.0, rate=2.0)
    assert opened.is_open_loop
    due = list(opened.arrivals())
    assert due == sorted(due)
    assert all(0 <= t < 100 for t in due)
    assert len(due) > 50
    assert all(1 <= closed.users_at(t) <= 8 for t in range(100))
    assert closed.users_at(99) == 8
    assert opened.ask().prompt


def test_requests_of_an_open_loop_come_like_those_of_independent_clients() -> None:
    due = list(scenario("steady", duration_s=2000.0, rate=5.0).arrivals())
    gaps = [after - before for before, after in pairwise(due)]
    assert len(due) == pytest.approx(10_000, rel=0.05)
    assert statistics.stdev(gaps) == pytest.approx(statistics.fmean(gaps), rel=0.05)  # as exponential gaps have it


def test_a_ramp_sends_a_quarter_of_its_requests_in_its_first_half() -> None:
    due = list(scenario("ramp", duration_s=2000.0, rate=5.0).arrivals())
    assert len(due) == pytest.approx(5000, rel=0.05)
    assert sum(t < 1000 for t in due) == pytest.approx(1250, rel=0.1)
    assert [scenario("ramp", users=4, duration_s=8.0).users_at(t) for t in range(8)] == [1, 1, 2, 2, 3, 3, 4, 4]


def test_a_burst_comes_at_one_instant_with_and_without_a_rate_between() -> None:
    burst = scenario("burst", duration_s=25.0, burst_size=3, burst_every_s=10.0)
    assert list(burst.arrivals()) == [0.0] * 3 + [10.0] * 3 + [20.0] * 3
    assert len(list(scenario("burst", duration_s=25.0, burst_size=3, rate=10.0).arrivals())) > 100


def test_domains_are_kept_apart_only_where_they_are_mixed() -> None:
    mixed, steady = scenario("mixed"), scenario("steady")
    assert {mixed.ask().domain for _ in range(50)} == {"a", "b"}
    assert {steady.ask().domain for _ in range(50)} == {""}


@pytest.mark.parametrize(
    ("name", "share", "expected"), [("cancel-storm", None, 0.5), ("cancel-storm", 0.2, 0.2), ("steady", None, 0.0)]
)
def test_so_many_clients_hang_up_as_were_asked_for(name: str, share: float | None, expected: float) -> None:
    asks = [
        scenario.ask() for scenario in [scenario(name, cancel_share=share, cancel_within_s=4.0)] for _ in range(2000)
    ]
    after = [ask.cancel_after_s for ask in asks if ask.cancel_after_s is not None]
    assert len(after) / len(asks) == pytest.approx(expected, abs=0.04)
    assert all(0 <= seconds <= 4.0 for seconds in after)


def test_long_prompts_are_long_and_never_the_same() -> None:
    long = scenario("long-prompts", prompt_words=500)
    prompts = [long.ask().prompt for _ in range(20)]
    assert all(500 <= len(prompt.split()) < 515 for prompt in prompts)
    assert len({prompt[:20] for prompt in prompts}) == 20


@pytest.mark.parametrize("bad", [{"rate": 0.0}, {"duration_s": -1.0}, {"users": 0}, {"cancel_share": 1.5}])
def test_a_load_that_makes_no_sense_is_refused(bad: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(bad))):
        Load(**bad)
