"""The engine on a simulated device: the resident CPU run's bits under every ordering, no race, memory that runs out."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest

import engine.device_experts as device_experts
from cache.device.sim import Adversary, SimDevice
from cache.device_pool import DevicePool, SlotBuffer
from engine.checkpoint import Checkpoint
from engine.config import CacheConfig, EngineConfig, SchedulerConfig
from engine.engine import Engine
from engine.errors import ConfigError
from engine.footprint import dense_nbytes
from engine.stream_backend import StreamBackend
from kernels.quant.formats import FORMATS
from tests.engine.conftest import greedy, run_all, tokens_of
from tests.engine.test_models import random_prompt
from tests.engine.test_offload import SHAPES, logprobs_of

ADVERSARIES = {
    "fair": Adversary(),
    "late compute": Adversary(seed=1, compute_delay_s=0.003),
    "late copies in pieces": Adversary(seed=2, copy_delay_s=0.003, num_pieces=4),
    "all late": Adversary(seed=3, copy_delay_s=0.002, compute_delay_s=0.002, num_pieces=3),
    "all late, otherwise": Adversary(seed=4, copy_delay_s=0.002, compute_delay_s=0.002, num_pieces=2),
    "a slow link": Adversary(seed=5, bandwidth=64e6),
}
REQUESTS = {f"r{i}": (random_prompt(5 + 9 * i, seed=i), greedy(6, logprobs=0)) for i in range(3)}


@pytest.fixture
def make_on() -> Iterator[Callable[..., Engine]]:
    """Engines on a device; at the end their books are right and their device has seen no race."""
    engines: list[tuple[Engine, SimDevice, bool]] = []

    def make(
        directory: Path,
        device: SimDevice,
        *,
        cache: dict[str, object] | None = None,
        scheduler: dict[str, object] | None = None,
        may_race: bool = False,
        **kwargs: object,
    ) -> Engine:
        config = EngineConfig(
            model=directory,
            kv_memory_nbytes=4 * 1024**2,
            max_model_len=128,
            cache=replace(CacheConfig(format="float32"), **(cache or {})),  # type: ignore[arg-type]
            scheduler=replace(SchedulerConfig(), **(scheduler or {})),  # type: ignore[arg-type]
            **kwargs,  # type: ignore[arg-type]
        )
        engines.append((Engine(config, device=device), device, may_race))
        return engines[-1][0]

    yield make
    for engine, device, may_race in engines:
        engine.close()
        engine.check_integrity()
        if not may_race:
            device.detector.check()


def results(engine: Engine) -> dict[str, tuple[list[int], list[float]]]:
    outputs = run_all(engine, REQUESTS)
    return {name: (tokens_of(parts), logprobs_of(parts)) for name, parts in outputs.items()}


@pytest.fixture(scope="module")
def expected(checkpoint) -> Callable[[str], object]:
    """What the CPU answers with all experts in memory."""
    known: dict[str, object] = {}

    def of(variant: str) -> object:
        if variant not in known:
            config = EngineConfig(
                model=checkpoint(variant)[0],
                kv_memory_nbytes=4 * 1024**2,
                max_model_len=128,
                cache=CacheConfig(format="float32"),
            )
            engine = Engine(config)
            known[variant] = results(engine)
            engine.close()
        return known[variant]

    return of


def slots(variant: str, num_slots: int) -> int:
    return num_slots * FORMATS["float32"].layout(*SHAPES[variant][:2]).nbytes


@pytest.mark.parametrize("name", ADVERSARIES)
@pytest.mark.parametrize("num_slots", [1, 5, 16])
def test_tokens_and_logprobs_are_the_cpus_bits_under_every_ordering(
    checkpoint, expected, make_on, name: str, num_slots: int
):
    device = SimDevice(adversary=ADVERSARIES[name])
    engine = make_on(checkpoint("olmoe")[0], device, cache={"memory_nbytes": slots("olmoe", num_slots)})
    assert isinstance(engine._runner.model.backend, StreamBackend)
    assert results(engine) == expected("olmoe")
    assert (engine.stats().expert_cache.evictions > 0) == (num_slots < 16)


@pytest.mark.parametrize("variant", ["mixtral", "qwen3-dense-layers-tied"])
def test_other_families_and_tiers_give_the_same_bits_too(checkpoint, expected, make_on, variant: str):
    record = FORMATS["float32"].layout(64, 96).nbytes
    for exclusive in (False, True):
        device = SimDevice(adversary=ADVERSARIES["all late"])
        cache = {"memory_nbytes": 3 * record, "host_memory_nbytes": 6 * record, "exclusive_tiers": exclusive}
        engine = make_on(checkpoint(variant)[0], device, cache=cache)
        assert results(engine) == expected(variant)
        assert engine.stats().expert_cache.host_hits > 0


@pytest.mark.parametrize("kernels", ["native", "reference"])
def test_the_simulated_device_serves_by_its_name(checkpoint, make_engine, kernels: str):
    directory, _ = checkpoint("olmoe")
    cpu = results(make_engine(directory, kernels=kernels))
    engine = make_engine(directory, kernels=kernels, device="sim", cache={"memory_nbytes": slots("olmoe", 4)})
    assert results(engine) == cpu
    assert engine._device.name == "sim"


def test_an_unknown_device_and_one_that_is_not_here_are_refused(checkpoint, make_engine):
    import torch

    with pytest.raises(ConfigError, match="unknown device 'tpu'; known: cpu, cuda, sim"):
        make_engine(checkpoint("olmoe")[0], device="tpu")
    if not torch.cuda.is_available():
        with pytest.raises(ConfigError, match="no CUDA device"):
            make_engine(checkpoint("olmoe")[0], device="cuda")


@pytest.mark.parametrize("num_slots", [3, 7])
def test_experts_get_what_is_left_beside_keys_values_and_other_weights(checkpoint, make_on, num_slots: int):
    directory, _ = checkpoint("olmoe")
    taken = 4 * 1024**2 + dense_nbytes(Checkpoint(directory), "float32")
    device = SimDevice(taken + int((num_slots + 0.5) * slots("olmoe", 1) / 0.9))  # a tenth of the rest is spared
    assert make_on(directory, device).stats().expert_cache.num_slots == num_slots
    with pytest.raises(ConfigError, match="expert memory of 0B cannot hold one float32 expert"):
        make_on(directory, SimDevice(taken))


def test_a_step_that_the_device_has_no_room_for_is_halved_and_nothing_changes(checkpoint, expected, make_on, caplog):
    device = SimDevice(adversary=replace(ADVERSARIES["all late"], fail_allocations={1, 2, 6, 11, 12, 30}))
    engine = make_on(checkpoint("olmoe")[0], device, cache={"memory_nbytes": slots("olmoe", 5)})
    assert results(engine) == expected("olmoe")
    assert "is halved" in caplog.text


def test_a_token_that_finds_no_room_at_all_fails_its_request_and_the_engine_lives(checkpoint, expected, make_on):
    device = SimDevice(adversary=Adversary(fail_allocations=range(1, 8)))  # a step of 42 tokens, halved until it is 1
    engine = make_on(checkpoint("olmoe")[0], device, cache={"memory_nbytes": slots("olmoe", 5)})
    outputs = run_all(engine, REQUESTS)
    failed = [name for name, parts in outputs.items() if parts[-1].finish_reason == "error"]
    assert failed == ["r0"]
    assert "device memory" in (outputs["r0"][-1].error or "")
    for name in ("r1", "r2"):
        assert (tokens_of(outputs[name]), logprobs_of(outputs[name])) == expected("olmoe")[name]
    engine.check_integrity()
    assert results(engine) == expected("olmoe")


def test_a_device_too_small_for_the_budget_is_refused_with_the_cure(checkpoint, make_on):
    device = SimDevice(memory_nbytes=2 * slots("olmoe", 1))
    with pytest.raises(ConfigError, match=r"3 experts of .* do not fit: .* lower --expert-memory"):
        make_on(checkpoint("olmoe")[0], device, cache={"memory_nbytes": slots("olmoe", 3)})
    device.close()


class _ForgetfulPool(DevicePool):
    """Hands a slot over without saying who still reads it."""

    def buffer(self, slot: int) -> SlotBuffer:
        return SlotBuffer(self.region(slot), (), lambda event: self._written.__setitem__(slot, event))


def test_a_slot_that_is_reused_while_it_is_read_is_caught(checkpoint, expected, make_on, monkeypatch):
    monkeypatch.setattr(device_experts, "DevicePool", _ForgetfulPool)
    device = SimDevice(adversary=ADVERSARIES["late compute"])
    engine = make_on(checkpoint("olmoe")[0], device, cache={"memory_nbytes": slots("olmoe", 2)}, may_race=True)
    found = results(engine)
    with pytest.raises(AssertionError, match=r"a copy in.* is not ordered after computing"):
        device.detector.check()
    assert found != expected("olmoe")  # and the reader that came late really read another expert


@pytest.mark.parametrize("predictor", ["stale_gate", "auto"])
def test_what_is_read_ahead_changes_no_bit_on_a_device(checkpoint, expected, make_on, predictor: str):
    device = SimDevice(adversary=replace(ADVERSARIES["a slow link"], compute_delay_s=0.001))
    cache = {"memory_nbytes": slots("olmoe", 9), "predictor": predictor}
    engine = make_on(checkpoint("olmoe")[0], device, cache=cache)
    assert results(engine) == expected("olmoe")


@pytest.mark.parametrize("name", ADVERSARIES)
def test_prompts_that_stream_whole_layers_have_the_same_bits_under_every_ordering(
    checkpoint, expected, make_on, name: str
):
    cache = {"memory_nbytes": slots("olmoe", 12), "predictor": "stream"}
    engine = make_on(checkpoint("olmoe")[0], SimDevice(adversary=ADVERSARIES[name]), cache=cache)
    assert results(engine) == expected("olmoe")
    ahead = engine.stats().expert_cache.prefetch[1]
    assert ahead.issued > 0
    assert ahead.useful + ahead.late > 0
