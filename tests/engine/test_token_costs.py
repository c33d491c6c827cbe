from __future__ import annotations

from pathlib import Path

import msgspec
import pytest

from engine.calibration import Calibration, ExpertCost, LinkCost, OffloadCost, PhaseCost, StepCost
from engine.config import CacheConfig, EngineConfig
from engine.convert import packed_path
from engine.plan import ServingPlan, plan_on
from engine.synthetic import SyntheticCheckpoint
from tests.engine.test_plan import MACHINE

MIB = 1024**2


def plan_of(directory: Path, memory_nbytes: int | None = None, dtype: str = "int8") -> ServingPlan:
    cache = CacheConfig(format="int8", memory_nbytes=memory_nbytes)
    config = EngineConfig(model=directory, dtype=dtype, cache=cache)  # type: ignore[arg-type]
    return plan_on(MACHINE, config, SyntheticCheckpoint("olmoe", None, directory))


def calibrate(directory: Path, **changes: object) -> Calibration:
    """OLMoE: 16 layers, 8 of 64 experts. A token's layer is 1 ms, its experts 0.5 ms each, a read 10 ms."""
    part = StepCost(fixed_s=1e-3, row_s=0.0)
    phase = PhaseCost(
        begin=part,
        first=part,
        layer=part,
        end=part,
        experts=ExpertCost(call_s=0.0, expert_s=0.5e-3, product_s=0.0),
        combine_product_s=0.0,
    )
    nbytes = plan_of(directory).experts_nbytes // 1024
    calibration = Calibration(
        machine="paper",
        model="olmoe",
        experts_format="int8",
        dtype="int8",
        is_measured=True,
        num_layers=16,
        num_experts=64,
        record_nbytes=nbytes,
        decode=phase,
        prefill=phase,
        disk=LinkCost(latency_s=2e-3, rates={1: nbytes / 8e-3}),
        offload=OffloadCost(call_s=1e-3, miss_s=0.1e-3),
    )
    calibration = msgspec.structs.replace(calibration, **changes)
    packed = packed_path(SyntheticCheckpoint("olmoe", None, directory), "int8", None)
    calibration.save(packed.with_name("calibration.int8.json"))
    return calibration


def test_a_calibrated_machine_is_as_fast_as_it_was_measured(tmp_path: Path):
    assert not plan_of(tmp_path).is_calibrated
    calibrate(tmp_path)
    plan = plan_of(tmp_path)
    assert plan.is_calibrated
    assert plan.tokens_per_s == pytest.approx(1 / (18e-3 + 128 * 0.5e-3))
    assert plan.bottleneck == "memory bandwidth"


def test_what_is_missed_is_read_behind_the_experts_that_are_there(tmp_path: Path):
    calibrate(tmp_path)
    plan = plan_of(tmp_path, 2048 * MIB)
    assert 0 < plan.hit_rate < 1
    missed = 128 * (1 - plan.hit_rate)
    stall_s = missed * 10e-3 - 64e-3 * plan.hit_rate
    assert plan.tokens_per_s == pytest.approx(1 / (18e-3 + 64e-3 + stall_s + 16e-3 + missed * 0.1e-3))
    assert plan.bottleneck == "the disk that experts come from"


@pytest.mark.parametrize("changes", [{"dtype": "float32"}, {"dtype": None}, {"num_layers": 8}, {"format_version": 99}])
def test_costs_of_something_else_are_left_alone(tmp_path: Path, changes: dict[str, object]):
    calibrate(tmp_path, **changes)
    assert not plan_of(tmp_path).is_calibrated
