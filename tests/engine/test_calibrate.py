"""Measuring a calibration with a tiny engine, and the comparison of simulation and engine."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from engine import synthetic
from engine.bench import Workload
from engine.bench_simulate import bench_simulate
from engine.calibrate import Subject, calibrate, calibration_path
from engine.calibration import Calibration
from engine.config import CacheConfig, EngineConfig
from tests.engine.test_bench import TINY

CONFIG = EngineConfig(model=Path(), kv_memory_nbytes=2**25, cache=CacheConfig(format="int8", policy="lru"))


@pytest.fixture(scope="module")
def calibration(tmp_path_factory: pytest.TempPathFactory) -> Calibration:
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(synthetic.SHAPES, "tiny", TINY | {"num_experts": 16})
        config = replace(CONFIG, model=tmp_path_factory.mktemp("calibrate") / "random")
        return calibrate(Subject(config=config, random_shape="tiny", num_layers=3))


def test_all_costs_are_measured_and_none_is_negative(calibration: Calibration, tmp_path: Path):
    shape = (calibration.num_layers, calibration.num_experts, calibration.experts_format, calibration.model)
    assert shape == (3, 16, "int8", "tiny-3")
    assert calibration.is_measured
    for phase in (calibration.decode, calibration.prefill):
        assert 0 < phase.layer.seconds(1, 100) < 1
        assert 0 < phase.first.seconds(1, 100) < 1
        assert 0 < phase.experts.seconds(2, 2) < 1
    assert sorted(calibration.disk.rates) == [1, 2, 4, 8]
    assert all(rate > 0 for rate in calibration.disk.rates.values())
    offload = calibration.offload
    assert min(offload.call_s, offload.row_s, offload.miss_s, offload.arrival_s, offload.foretell_s) >= 0
    assert min(offload.compute_slowdown, offload.read_slowdown) >= 1


def test_hits_are_foretold_exactly_where_nothing_is_read_ahead(calibration: Calibration, monkeypatch):
    monkeypatch.setitem(synthetic.SHAPES, "tiny", TINY | {"num_experts": 16})
    rows = list(
        bench_simulate(
            CONFIG,
            random_shape="tiny",
            num_layers=3,
            routing_skew=0.5,
            workload=Workload(prompt_tokens=12, output_tokens=8, temperature=1.0),
            num_seqs=(1, 2),
            memory_shares=(0.5,),
            links=(None, 2.0**19),
            calibration=calibration,
        )
    )
    assert [(row.num_seqs, row.predictor) for row in rows] == [
        (n, name) for n in (1, 2) for name in ("off", "oracle") * 2
    ]
    for row in rows:
        if row.predictor == "off":
            assert row.predicted_hit_rate == pytest.approx(row.measured_hit_rate)
        if row.link_gib_per_s is not None:  # a record takes 16 ms of it, whatever else there is to do
            assert min(row.predicted_stall_share, row.measured_stall_share) > 0.5


def test_a_calibration_lies_beside_the_packed_experts_or_elsewhere_for_random_weights(checkpoint, tmp_path: Path):
    directory, _ = checkpoint("olmoe")
    subject = Subject(config=replace(CONFIG, model=directory))
    assert calibration_path(subject, tmp_path) == directory / "foregate" / "calibration.int8.json"
    subject = Subject(config=replace(CONFIG, model=tmp_path), random_shape="olmoe", num_layers=4)
    assert calibration_path(subject, tmp_path / "other") == tmp_path / "other" / "olmoe-4.int8.json"
