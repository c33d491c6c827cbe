"""A device is measured, and keys and values get what serves the most tokens."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from cache.device.sim import Adversary, SimDevice
from engine.checkpoint import Checkpoint
from engine.config import CacheConfig, EngineConfig, SchedulerConfig
from engine.device_memory import measure_rates, with_shared_memory
from engine.engine import Engine
from engine.errors import ConfigError
from engine.footprint import dense_nbytes, kv_token_nbytes
from engine.memory_split import Rates
from kernels.quant.formats import FORMATS
from tests.engine.conftest import greedy, run_all, tokens_of

RECORD = FORMATS["float32"].layout(64, 32).nbytes
MIB = 1024**2


def config_of(directory: Path, **changes: object) -> EngineConfig:
    config = EngineConfig(
        model=directory,
        max_model_len=64,
        share_memory=True,
        dtype="float32",
        cache=CacheConfig(format="float32"),
        scheduler=SchedulerConfig(max_num_seqs=8),
    )
    return replace(config, **changes)  # type: ignore[arg-type]


def test_a_links_rate_and_the_memorys_are_measured_and_nothing_is_kept():
    device = SimDevice(256 * MIB, Adversary(bandwidth=1e9))
    rates = measure_rates(device)
    assert 0 < rates.link <= 1e9
    assert rates.memory > rates.link
    assert device.memory()[0] == 256 * MIB
    device.detector.check()
    device.close()


def test_keys_and_values_get_more_of_a_larger_device_and_less_beside_a_slow_link(checkpoint):
    directory, _ = checkpoint("olmoe")
    dense = dense_nbytes(Checkpoint(directory), "float32")
    found = {}
    for slots, link in ((12, 1e5), (12, 1e12), (200, 1e5)):
        device = SimDevice(dense + slots * RECORD)
        config = with_shared_memory(config_of(directory), Checkpoint(directory), device, Rates(memory=1e9, link=link))
        found[slots, link] = config.kv_memory_nbytes
        device.close()
    assert found[12, 1e5] < found[12, 1e12]
    assert found[12, 1e5] < found[200, 1e5]
    token = kv_token_nbytes(Checkpoint(directory), "float32")
    assert all(nbytes >= 64 * token for nbytes in found.values())  # the longest request fits


def test_what_is_settled_stays_as_it_is(checkpoint):
    directory, _ = checkpoint("olmoe")
    device = SimDevice(8 * MIB)
    for config, where in (
        (config_of(directory), None),
        (config_of(directory, share_memory=False), device),
        (config_of(directory, cache=CacheConfig(format="float32", memory_nbytes=RECORD)), device),
    ):
        assert with_shared_memory(config, Checkpoint(directory), where) is config
    device.close()


def test_a_device_for_which_there_is_no_split_is_refused_with_the_cure(checkpoint):
    directory, _ = checkpoint("olmoe")
    device = SimDevice(dense_nbytes(Checkpoint(directory), "float32") + RECORD)
    with pytest.raises(ConfigError, match="cannot hold a request of 64 tokens and an expert; lower --max-model-len"):
        with_shared_memory(config_of(directory), Checkpoint(directory), device, Rates(memory=1e9, link=1e9))
    device.close()


def test_an_engine_whose_memory_is_shared_so_serves(checkpoint):
    directory, _ = checkpoint("olmoe")
    device = SimDevice(4 * MIB, Adversary(bandwidth=64e6))
    engine = Engine(config_of(directory), device=device)
    assert engine.config.kv_memory_nbytes != EngineConfig(model=directory).kv_memory_nbytes
    outputs = run_all(engine, {"a": ([1, 2, 3], greedy(3))})
    assert len(tokens_of(outputs["a"])) == 3
    engine.close()
    engine.check_integrity()
    device.detector.check()
