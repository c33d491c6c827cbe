from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from cache.replay import replay
from cache.trace import RoutingTrace
from engine.bench import _TimedBackend
from engine.checkpoint import Checkpoint
from engine.config import CacheConfig, EngineConfig
from engine.engine import Engine
from engine.errors import ConfigError
from engine.footprint import dense_nbytes, streamed_nbytes
from engine.machine import Machine, measure_machine
from engine.plan import ServingPlan, plan_on, planned_engine, with_plan
from engine.synthetic import SyntheticCheckpoint
from kernels.backend import choose_backend

GIB = 1024**3
MACHINE = Machine(
    num_threads=2, free_nbytes=24 * GIB, memory_bandwidth=10e9, disk_bandwidth=1e9, disk_free_nbytes=200 * GIB
)
MakeCheckpoint = Callable[[str], tuple[Path, torch.nn.Module]]


def plan_of(tmp_path: Path, shape: str = "olmoe", machine: Machine = MACHINE, **cache: object) -> ServingPlan:
    config = EngineConfig(model=tmp_path / shape, dtype="int8", cache=CacheConfig(**cache))  # type: ignore[arg-type]
    return plan_on(machine, config, SyntheticCheckpoint(shape, None, tmp_path / shape))


def test_the_most_exact_format_that_fits_is_chosen(tmp_path: Path):
    formats = {}
    for free in (40, 24, 11, 6, 3):
        plan = plan_of(tmp_path, machine=replace(MACHINE, free_nbytes=free * GIB))
        formats[free] = plan.experts, plan.num_slots < plan.num_experts
    assert formats == {
        40: ("bf16", False),
        24: ("bf16", False),
        11: ("int8", False),
        6: ("int4", False),
        3: ("int4", True),
    }


def test_what_is_set_is_kept(tmp_path: Path):
    plan = plan_of(tmp_path, format="int8", memory_nbytes=2 * GIB)
    assert plan.experts == "int8"
    assert plan.expert_memory_nbytes <= 2 * GIB
    assert plan_of(tmp_path, memory_nbytes=2 * GIB).experts == "bf16"  # whoever sets a budget wants it below
    config = EngineConfig(model=tmp_path, cache=CacheConfig(format="int8"))
    assert with_plan(config, plan_of(tmp_path)).cache.format == "int8"
    assert with_plan(replace(config, cache=CacheConfig()), plan_of(tmp_path)).cache.format == "bf16"


def test_speed_follows_from_bytes(tmp_path: Path):
    resident = plan_of(tmp_path, format="int4")
    assert resident.hit_rate == 1.0
    assert resident.bottleneck == "memory bandwidth"
    faster = plan_of(tmp_path, format="int4", machine=replace(MACHINE, memory_bandwidth=40e9))
    assert 2.5 < faster.tokens_per_s / resident.tokens_per_s < 4
    half = plan_of(tmp_path, format="int4", memory_nbytes=resident.experts_nbytes // 2)
    quarter = plan_of(tmp_path, format="int4", memory_nbytes=resident.experts_nbytes // 4)
    assert resident.tokens_per_s > half.tokens_per_s > quarter.tokens_per_s
    assert 0.5 < quarter.hit_rate < half.hit_rate < 1.0
    assert quarter.bottleneck == "the disk that experts come from"
    slower = plan_of(tmp_path, format="int4", memory_nbytes=resident.experts_nbytes // 4, link_bandwidth=0.25e9)
    assert slower.tokens_per_s < 0.5 * quarter.tokens_per_s
    assert "below one token's" in plan_of(tmp_path, format="int4", memory_nbytes=100 * 1024**2).why


@pytest.mark.parametrize(
    ("machine", "cache", "why"),
    [
        (replace(MACHINE, free_nbytes=GIB // 2), {}, "choose --dtype int8"),
        (replace(MACHINE, disk_free_nbytes=GIB), {"format": "int4"}, "choose another --packed-dir"),
        (MACHINE, {"format": "int8", "memory_nbytes": 1000}, "not one expert"),
        (MACHINE, {"memory_nbytes": 30 * GIB}, "lower --kv-memory"),
    ],
)
def test_it_says_what_does_not_fit(tmp_path: Path, machine: Machine, cache: dict[str, object], why: str):
    plan = plan_of(tmp_path, machine=machine, **cache)
    assert not plan.fits
    assert why in plan.why
    assert "does not fit" in plan.lines()[0]


def test_a_trace_gives_the_models_own_hit_rate(tmp_path: Path):
    rng = np.random.default_rng(0)
    ids = np.stack([[rng.permutation(12)[:8] for _ in range(16)] for _ in range(60)]).astype(np.uint8)
    trace = RoutingTrace(ids, np.asarray([0, 60]), np.asarray([0]), 64, tuple(range(16)), ("",))
    config = EngineConfig(model=tmp_path, cache=CacheConfig(format="int4", memory_nbytes=GIB))
    plan = plan_on(MACHINE, config, SyntheticCheckpoint("olmoe", None, tmp_path), trace)
    assert plan.hit_rate == replay(trace, "segment", plan.num_slots).hit_rate
    assert plan.hit_rate_of == "hit rate of the trace"
    with pytest.raises(ConfigError, match="1024 experts, this one has 512"):
        plan_on(MACHINE, config, SyntheticCheckpoint("olmoe", 8, tmp_path), trace)


@pytest.mark.parametrize("variant", ["mixtral", "olmoe-tied", "qwen3", "qwen3-dense-layers-tied"])
@pytest.mark.parametrize("dtype", ["float32", "int8", "int4"])
def test_a_step_reads_the_weights_that_were_foretold(checkpoint: MakeCheckpoint, variant: str, dtype: str):
    directory, _ = checkpoint(variant)
    backend = _TimedBackend(choose_backend("auto", 1))
    engine = Engine(
        EngineConfig(model=directory, dtype=dtype, kv_memory_nbytes=16 * 1024**2),  # type: ignore[arg-type]
        backend=backend,  # type: ignore[arg-type]
    )
    engine.close()
    opened = Checkpoint(directory)
    assert streamed_nbytes(opened, dtype) == backend.dense_nbytes > 0
    table = opened.spec.vocab_size * opened.spec.hidden_size
    assert dense_nbytes(opened, dtype) - backend.dense_nbytes == table * (4 if dtype == "float32" else 2)


def test_this_machine_is_measured(tmp_path: Path):
    measured = measure_machine(tmp_path / "not" / "there", [])
    assert measured.free_nbytes > 0
    assert measured.disk_free_nbytes > 0
    assert measured.disk_bandwidth is None or 1e6 < measured.disk_bandwidth < 1e12
    assert measured.memory_bandwidth is None or 1e8 < measured.memory_bandwidth < 1e13
    assert list(tmp_path.iterdir()) == []


def test_a_planned_engine_serves(checkpoint: MakeCheckpoint, caplog: pytest.LogCaptureFixture):
    directory, _ = checkpoint("mixtral")
    caplog.set_level("INFO")
    engine = planned_engine(EngineConfig(model=directory, kv_memory_nbytes=16 * 1024**2))
    try:
        assert engine.config.cache.format == "bf16"
        assert engine.expert_cache.holds_all
        assert any("all experts in memory" in record.message for record in caplog.records)
    finally:
        engine.close()
