"""Experts computed on the CPU beside a device: the same bits where kernels are the same, and only if it pays."""

from __future__ import annotations

import time
from dataclasses import replace

import pytest

from cache.device.sim import SimDevice
from engine.config import CacheConfig, EngineConfig
from engine.engine import Engine
from engine.errors import ConfigError
from engine.layers.cpu_experts import CpuCosts
from tests.engine.conftest import run_all
from tests.engine.test_device import ADVERSARIES, REQUESTS, expected, make_on, results, slots  # noqa: F401

KEPT = {"cpu_experts": True, "host_memory_nbytes": 1 << 20}  # all of them in pinned memory


class _Swift(CpuCosts):
    """As fast as said, whatever else this machine has to do."""

    def took(self, rows, seconds: float) -> None:
        pass


@pytest.mark.parametrize("name", ["fair", "all late", "late copies in pieces"])
def test_what_the_cpu_computes_beside_a_slow_link_has_the_same_bits(checkpoint, expected, make_on, name: str):  # noqa: F811
    device = SimDevice(adversary=replace(ADVERSARIES[name], bandwidth=16e6))
    engine = make_on(checkpoint("olmoe")[0], device, cache={"memory_nbytes": slots("olmoe", 4), **KEPT})
    engine._experts.on_cpu._costs = _Swift(1e-9, 1e-9)
    results(engine)  # until the link is known
    assert results(engine) == expected("olmoe")
    stats = engine.stats().expert_cache
    assert stats.sources["cpu_compute"] > 0
    assert stats.sources["top"] + stats.sources["prefetch"] > 0  # the device computed others, asked for or foretold
    check_at_rest(engine)


def check_at_rest(engine: Engine) -> None:
    """Nothing is held once copies that were begun ahead, and that a slow link still carries, are there."""
    deadline = time.monotonic() + 20.0
    while engine._experts.cache.transfer.in_flight_nbytes and time.monotonic() < deadline:
        time.sleep(0.01)
    engine._device.compute.synchronize()
    while True:
        try:
            return engine._experts.tier.check_integrity()
        except AssertionError:  # what has arrived is let go by another thread
            if time.monotonic() > deadline:
                raise
            time.sleep(0.01)


def test_a_cpu_that_was_measured_to_be_slow_is_given_nothing(checkpoint, expected, make_on):  # noqa: F811
    device = SimDevice()
    engine = make_on(checkpoint("olmoe")[0], device, cache={"memory_nbytes": slots("olmoe", 4), **KEPT})
    engine._experts.on_cpu._costs = CpuCosts(10.0, 1.0)
    for _ in range(3):
        assert results(engine) == expected("olmoe")
    stats = engine.stats().expert_cache
    assert stats.bandwidth > 0
    assert stats.sources["cpu_compute"] == 0


def test_work_of_the_cpu_that_fails_fails_the_step_and_holds_nothing(checkpoint, make_on, monkeypatch):  # noqa: F811
    engine = make_on(
        checkpoint("olmoe")[0], SimDevice(), cache={"memory_nbytes": slots("olmoe", 4), **KEPT}, may_race=True
    )
    results(engine)
    on_cpu = engine._experts.on_cpu
    on_cpu._costs = CpuCosts(0.0, 1e-9)
    monkeypatch.setattr(type(engine._experts.cache.transfer), "bandwidth", 1.0)

    def fail(*args: object) -> None:
        raise RuntimeError("the kernels are gone")

    monkeypatch.setattr(on_cpu, "_backend", type("Broken", (), {"expert_mlp": staticmethod(fail)}))
    outputs = run_all(engine, REQUESTS)
    assert all("the kernels are gone" in (parts[-1].error or "") for parts in outputs.values())
    engine._device.compute.synchronize()
    engine._experts.tier.check_integrity()


def test_without_a_device_there_is_nothing_to_share(checkpoint):
    with pytest.raises(ConfigError, match="leave out --cpu-experts"):
        Engine(EngineConfig(model=checkpoint("olmoe")[0], cache=CacheConfig(format="float32", cpu_experts=True)))


def test_estimates_follow_what_was_measured_and_trust_it_less_with_time():
    costs = CpuCosts(1e-3, 1e-4)
    assert costs.seconds(10) == pytest.approx(2e-3)
    for _ in range(50):
        costs.took([10, 10], 12e-3)  # three times as long as expected
    assert costs.seconds(10) == pytest.approx(6e-3, rel=0.01)
    for _ in range(256):
        costs.unused()
    assert costs.seconds(10) == pytest.approx(4e-3, rel=0.01)
    costs.took([10], 4e-3)
    assert 3.9e-3 < costs.seconds(10) < 4.1e-3
