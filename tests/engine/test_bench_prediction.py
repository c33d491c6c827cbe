from __future__ import annotations

import pytest

from engine.bench_prediction import FUSED, bench_prediction
from engine.config import CacheConfig, EngineConfig, SchedulerConfig
from engine.errors import ConfigError


def config_of(directory) -> EngineConfig:
    return EngineConfig(
        model=directory,
        kv_memory_nbytes=16 * 1024**2,
        max_model_len=256,
        cache=CacheConfig(format="float32"),
        scheduler=SchedulerConfig(max_num_seqs=8),
    )


def test_every_predictor_and_the_fusion_are_judged_on_the_same_steps(checkpoint):
    directory, _ = checkpoint("olmoe")
    prompts = [f"{word} {number}" for word in ("tell", "ask", "say") for number in range(8)]
    results = {r.predictor: r for r in bench_prediction(config_of(directory), prompts=prompts, output_tokens=32)}
    assert set(results) == {"history", "stale_gate", "token", FUSED}  # there is no probe
    for result in results.values():
        assert result.ahead.keys() == {1}  # of two layers
        assert 0.0 < result.ahead[1] <= 1.0
    assert results["stale_gate"].from_tokens is None
    assert results["token"].from_tokens > 3 / 8 + 0.1  # chance: 3 of 8 experts
    for name in ("history", "stale_gate", "token"):
        assert results[FUSED].ahead[1] >= results[name].ahead[1] - 0.03


def test_a_model_without_experts_is_refused(checkpoint):
    with pytest.raises(ConfigError, match="nothing to foretell"):
        bench_prediction(config_of(checkpoint("llama-llama3-rope")[0]))
