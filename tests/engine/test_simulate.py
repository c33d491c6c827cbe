"""The event model on traces so small that every second of a step is known beforehand."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import msgspec
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cache.replay import REPLAY_POLICIES, replay, schedule
from cache.trace import RoutingTrace
from engine.calibration import (
    Calibration,
    ExpertCost,
    LinkCost,
    OffloadCost,
    PhaseCost,
    StepCost,
    load_calibration,
)
from engine.cost_fit import fit_costs
from engine.errors import ConfigError
from engine.simulate import SimulationResult, SimulationSettings, simulate
from tests.cache.synthetic_traces import local_trace, random_trace, trace_of

RECORD = 4096


def cost_of(begin: float = 1.0, first: float = 0.0, layer: float = 2.0, end: float = 3.0) -> PhaseCost:
    return PhaseCost(
        begin=StepCost(fixed_s=begin, row_s=0.0),
        first=StepCost(fixed_s=first, row_s=0.0),
        layer=StepCost(fixed_s=layer, row_s=0.0),
        end=StepCost(fixed_s=end, row_s=0.0),
        experts=ExpertCost(call_s=0.0, expert_s=1.0, product_s=0.0),
        combine_product_s=0.0,
    )


def calibration_of(trace: RoutingTrace, **changes: object) -> Calibration:
    """A step is 1, then 2 for each later layer, then 3, and 1 for each expert; a record takes 0.5, then 1 if alone."""
    calibration = Calibration(
        machine="paper",
        model="tiny",
        experts_format="int8",
        is_measured=True,
        num_layers=len(trace.layers),
        num_experts=trace.num_experts,
        record_nbytes=RECORD,
        decode=cost_of(),
        prefill=cost_of(),
        disk=LinkCost(latency_s=0.5, rates={1: RECORD, 8: RECORD}),
        offload=OffloadCost(),
        max_depth=2,
    )
    return msgspec.structs.replace(calibration, **changes)


def tokens(*chosen: list[list[int]], num_experts: int = 8) -> RoutingTrace:
    """One request; of each token the experts of each layer."""
    return trace_of(np.asarray(chosen), [len(chosen)], num_experts)


def last_step(trace: RoutingTrace, num_slots: int, **changes: object) -> SimulationResult:
    names = {"predictor", "policy", "link_bandwidth", "host_slots", "exclusive_tiers", "concurrency"}
    of_settings = {name: changes.pop(name) for name in list(changes) if name in names}
    return simulate(
        trace,
        calibration_of(trace, **changes),
        SimulationSettings(num_slots=num_slots, **{"policy": "lru", **of_settings}),
        num_warm_ups=trace.num_tokens - 1,
    )


def test_a_step_whose_experts_are_all_there_is_the_sum_of_its_compute():
    result = last_step(tokens([[0], [0]], [[0], [0]]), 2)
    assert result.decode.step_ms == pytest.approx(1e3 * (1 + 1 + 2 + 1 + 3))
    assert (result.decode.hit_rate, result.decode.stall_share, result.decode.read_mb_per_token) == (1.0, 0.0, 0.0)


@pytest.mark.parametrize(("last", "misses"), [([[0], [1]], 1), ([[2], [1]], 2)])
def test_each_miss_adds_its_read_where_nothing_else_can_be_computed(last: list[list[int]], misses: int):
    result = last_step(tokens([[0], [0]], last), 4)
    assert result.decode.step_ms == pytest.approx(1e3 * (8 + 1.5 * misses))
    assert result.decode.stall_share == pytest.approx(1.5 * misses / (8 + 1.5 * misses))
    assert result.decode.hit_rate == pytest.approx(1 - misses / 2)
    assert result.decode.read_mb_per_token == pytest.approx(misses * RECORD / 1e6)


def test_experts_that_are_there_are_computed_while_the_others_are_read():
    trace = tokens([[0, 1]], [[0, 2]])  # the read of 1.5 behind an expert of 1
    assert last_step(trace, 4).decode.step_ms == pytest.approx(1e3 * (1 + 1.5 + 1 + 3))
    assert last_step(trace, 4).decode.stall_share == pytest.approx(0.5 / 6.5)


def test_small_experts_are_waited_for_together():
    one_by_one = last_step(tokens([[0, 1]], [[2, 5]]), 4, max_depth=1)
    assert one_by_one.decode.step_ms == pytest.approx(1e3 * (1 + 1.5 + 1.5 + 2 + 3))


@pytest.fixture
def large_experts(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that each is computed as soon as it is there."""
    monkeypatch.setattr("cache.residents._WAVE_NBYTES", RECORD)


@pytest.mark.usefixtures("large_experts")
def test_reads_at_once_share_the_disk_and_neighbours_come_in_one_read():
    apart = tokens([[0, 1]], [[2, 5]])
    # together 0.5 + 2 x 1; both are there at once, and computed in one call
    assert last_step(apart, 4).decode.step_ms == pytest.approx(1e3 * (1 + 2.5 + 2 + 3))
    one_by_one = last_step(apart, 4, max_depth=1)  # the second's 1.5 goes on while the first is computed
    assert one_by_one.decode.step_ms == pytest.approx(1e3 * (1 + 1.5 + 1.5 + 1 + 3))
    faster = LinkCost(latency_s=0.5, rates={1: RECORD, 2: 2 * RECORD})
    assert last_step(apart, 4, disk=faster).decode.step_ms == pytest.approx(1e3 * (1 + 1.5 + 2 + 3))
    assert last_step(tokens([[0, 1]], [[2, 3]]), 4, max_depth=1).decode.step_ms == pytest.approx(1e3 * 8.5)


@pytest.mark.usefixtures("large_experts")
def test_a_link_is_crossed_by_one_record_at_a_time():
    trace = tokens([[0, 1]], [[2, 5]])
    fast = LinkCost(latency_s=0.0, rates={1: 1e12})
    result = last_step(trace, 4, disk=fast, link_bandwidth=RECORD / 3)
    assert result.decode.step_ms == pytest.approx(1e3 * (1 + 3 + 3 + 1 + 3))  # one is computed behind the other's 3
    result = last_step(trace, 4, disk=fast, link_bandwidth=RECORD / 3, crossing_s=1.0)
    assert result.decode.step_ms == pytest.approx(1e3 * (1 + 4 + 4 + 1 + 3))


def test_an_oracle_reads_a_layer_ahead_while_the_one_before_is_computed():
    trace = tokens([[0], [0]], [[0], [1]])
    assert last_step(trace, 4).decode.step_ms == pytest.approx(1e3 * 9.5)
    ahead = last_step(trace, 4, predictor="oracle")
    assert ahead.decode.step_ms == pytest.approx(1e3 * 8)
    assert (ahead.decode.stall_share, ahead.decode.hit_rate) == (0.0, 1.0)
    assert ahead.decode.read_mb_per_token == pytest.approx(RECORD / 1e6)


def test_an_oracle_that_is_late_is_waited_for_no_longer_than_its_read():
    trace = tokens([[0], [0]], [[0], [1]])
    slow = LinkCost(latency_s=0.0, rates={1: RECORD / 5})
    # begun at 1, before the first layer; the second asks at 1 + 1 + 2
    assert last_step(trace, 4, disk=slow, predictor="oracle").decode.stall_share == pytest.approx(2 / 10)


def test_compute_and_reads_slow_one_another():
    trace = tokens([[0, 1]], [[0, 2]])
    slower = last_step(trace, 4, offload=OffloadCost(compute_slowdown=1.25))
    assert slower.decode.step_ms == pytest.approx(1e3 * (1 + 1.5 + 1 + 3))  # 1.25 still fits behind the read
    # one second of compute, 0.5 of it behind the latency and 0.5 x RECORD / 2 of the read, then the other 0.75
    slower = last_step(trace, 4, offload=OffloadCost(read_slowdown=2.0))
    assert slower.decode.step_ms == pytest.approx(1e3 * (1 + 1 + 0.75 + 1 + 3))


def test_the_thread_that_computes_pays_for_bookkeeping_and_arrivals():
    trace = tokens([[0], [0]], [[0], [1]])
    costs = OffloadCost(call_s=0.1, row_s=0.02, miss_s=0.3, arrival_s=0.05)
    result = last_step(trace, 4, offload=costs)
    assert result.decode.step_ms == pytest.approx(
        1e3 * (8 + 2 * 0.12 + 1.5 + 0.05)
    )  # a ticket is written while it is read


def test_a_tier_between_answers_before_the_disk():
    trace = tokens([[0]], [[1]], [[0]])
    both = {"host_bandwidth": RECORD / 0.25}
    assert last_step(trace, 1, host_slots=2, **both).decode.step_ms == pytest.approx(1e3 * (1 + 0.25 + 1 + 3))
    assert last_step(trace, 1, host_slots=1, **both).decode.step_ms == pytest.approx(1e3 * (1 + 1.5 + 1 + 3))
    assert last_step(trace, 1, host_slots=1, exclusive_tiers=True, **both).decode.step_ms == pytest.approx(1e3 * 5.25)


@pytest.mark.parametrize("policy", [*REPLAY_POLICIES])
def test_without_prediction_hits_are_those_of_the_replay(policy: str):
    trace = local_trace(1, [30, 20, 25], num_prompt=6)
    num_slots = trace.num_keys // 4
    simulated = simulate(
        trace, calibration_of(trace), SimulationSettings(num_slots=num_slots, policy=policy, concurrency=2)
    )
    replayed = replay(trace, policy, num_slots, concurrency=2)
    for mine, its in ((simulated.decode, replayed.decode), (simulated.prefill, replayed.prefill)):
        assert mine.hit_rate == pytest.approx(its.hits / its.queries)
    assert simulated.decode.num_steps + simulated.prefill.num_steps == replayed.num_steps


@pytest.mark.parametrize("predictor", ["off", "oracle", "auto"])
@pytest.mark.parametrize("num_slots", [1, 3, 7])
def test_layers_that_do_not_fit_are_simulated_in_waves(predictor: str, num_slots: int):
    trace = random_trace(2, [12, 12], num_prompt=10)
    result = simulate(trace, calibration_of(trace), SimulationSettings(num_slots=num_slots, predictor=predictor))
    assert result.decode.num_tokens + result.prefill.num_tokens == 24
    assert 0 < result.decode.stall_share < 1


def test_steps_may_come_from_another_scheduler():
    trace = random_trace(0, [6, 6])
    config = SimulationSettings(num_slots=6, concurrency=2)
    backwards = lambda: reversed(list(schedule(trace, 2)))  # noqa: E731
    assert simulate(trace, calibration_of(trace), config, steps=backwards).decode.num_steps == 6
    assert simulate(trace, calibration_of(trace), config, steps=partial(schedule, trace, 1)).decode.num_steps == 12


def test_a_better_predictor_waits_less():
    trace = local_trace(5, [150], num_experts=32)
    stalls = {}
    cost = cost_of(layer=3.0)
    calibration = calibration_of(trace, decode=cost, disk=LinkCost(latency_s=0.1, rates={1: RECORD}))
    for recall in (0.2, 0.95):
        config = SimulationSettings(num_slots=40, predictor="auto", recall=recall, precision=recall)
        stalls[recall] = simulate(trace, calibration, config).decode.stall_share
    off = simulate(trace, calibration, SimulationSettings(num_slots=40)).decode.stall_share
    assert stalls[0.95] < off
    assert stalls[0.95] < stalls[0.2]


bandwidths = st.floats(min_value=RECORD / 8, max_value=RECORD * 8)


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 1000), bandwidths, st.floats(1.0, 4.0), st.sampled_from(["off", "oracle"]))
def test_a_faster_disk_is_never_slower(seed: int, bandwidth: float, factor: float, predictor: str):
    trace = random_trace(seed, [8, 5], num_prompt=3)
    config = SimulationSettings(num_slots=8, policy="lru", concurrency=2, predictor="off")
    rates = [
        simulate(
            trace, calibration_of(trace, disk=LinkCost(latency_s=0.0, rates={1: rate}), max_depth=1), config
        ).output_tokens_per_s
        for rate in (bandwidth, bandwidth * factor)
    ]
    assert rates[1] >= rates[0] * (1 - 1e-9)


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 1000), st.integers(2, 17))
def test_a_larger_belady_cache_never_hits_less_and_never_takes_longer_reading(seed: int, num_slots: int):
    trace = random_trace(seed, [20])
    hits = [
        simulate(trace, calibration_of(trace), SimulationSettings(num_slots=slots, policy="belady")).decode.hit_rate
        for slots in (num_slots, num_slots + 1)
    ]
    assert hits[1] >= hits[0]


def test_a_calibration_survives_its_file(tmp_path: Path):
    calibration = calibration_of(random_trace(0, [4]), memory_nbytes=1 << 34)
    calibration.save(tmp_path / "sub" / "calibration.json")
    assert load_calibration(tmp_path / "sub" / "calibration.json") == calibration


def test_what_is_no_calibration_is_named(tmp_path: Path):
    with pytest.raises(ConfigError, match="foregate calibrate"):
        load_calibration(tmp_path / "none.json")
    (tmp_path / "bad.json").write_text("{}")
    with pytest.raises(ConfigError, match=r"bad\.json is not a calibration"):
        load_calibration(tmp_path / "bad.json")
    msgspec.structs.replace(calibration_of(random_trace(0, [4])), format_version=9).save(tmp_path / "new.json")
    with pytest.raises(ConfigError, match="version 9"):
        load_calibration(tmp_path / "new.json")


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"policy": "best"}, "unknown cache policy 'best'; known: belady"),
        ({"num_slots": 0}, "at least one slot"),
        ({"predictor": "crystal"}, "unknown predictor 'crystal'; known: off, stream, oracle, auto"),
        ({"recall": 0.0}, "recall is above"),
        ({"concurrency": 0}, "at least 1"),
        ({"link_bandwidth": 0.0}, "carries nothing"),
    ],
)
def test_settings_that_cannot_be_are_refused(changes: dict[str, object], why: str):
    trace = random_trace(0, [4])
    config = msgspec.structs.replace(SimulationSettings(num_slots=4), **changes)
    with pytest.raises(ConfigError, match=why):
        simulate(trace, calibration_of(trace), config)


def test_a_trace_of_another_model_is_refused():
    trace = random_trace(0, [4])
    with pytest.raises(ConfigError, match="5 layers with experts, the trace has 3"):
        simulate(trace, calibration_of(trace, num_layers=5), SimulationSettings(num_slots=4))
    with pytest.raises(ConfigError, match="64 experts a layer, the trace has 6"):
        simulate(trace, calibration_of(trace, num_experts=64), SimulationSettings(num_slots=4))


def test_costs_are_fitted_despite_what_disturbs_some_measurements():
    rng = np.random.default_rng(0)
    features = [(1.0, float(experts), float(rows)) for experts in range(1, 9) for rows in range(1, 33, 4)]
    times = [1e-3 + 2e-3 * experts + 1e-5 * rows for _, experts, rows in features]
    noisy = [time * (1 + 0.02 * rng.standard_normal()) * (5.0 if rng.random() < 0.15 else 1.0) for time in times]
    fitted = fit_costs(features, noisy)
    assert fitted[1] == pytest.approx(2e-3, rel=0.05)
    for row, time in zip(features, times, strict=True):
        assert np.dot(fitted, row) == pytest.approx(time, rel=0.1)


@pytest.mark.parametrize("reads_s", [0.2, 0.5, 1.0, 2.0])
def test_prompts_that_stream_whole_layers_wait_less(reads_s: float):
    # all prompt, routed at random: a chunk needs every expert
    trace = random_trace(0, [128], num_layers=6, num_experts=16, active=4, num_prompt=128)
    costs = cost_of(layer=4.0)
    calibration = calibration_of(trace, prefill=costs, disk=LinkCost(latency_s=0.0, rates={1: RECORD / reads_s}))
    found = {}
    for predictor in ("off", "stream", "oracle"):
        config = SimulationSettings(num_slots=36, predictor=predictor, prefill_chunk=32)  # of 96: two layers and some
        found[predictor] = simulate(trace, calibration, config).prefill
    assert found["stream"].stall_share < 0.95 * found["off"].stall_share
    assert found["stream"].tokens_per_s > 1.03 * found["off"].tokens_per_s
    # nothing is waited for that who knows the routing would not wait for
    assert found["stream"].stall_share <= found["oracle"].stall_share


def test_streaming_layers_leaves_decode_alone():
    trace = local_trace(3, [120], num_experts=32)
    settings = [SimulationSettings(num_slots=40, predictor=predictor) for predictor in ("off", "stream")]
    off, stream = (simulate(trace, calibration_of(trace), each).decode for each in settings)
    assert stream == off
