from __future__ import annotations

import pytest

from engine.checkpoint import Checkpoint
from engine.config import CacheConfig, EngineConfig
from engine.errors import ConfigError
from engine.path_router import load_path_router
from engine.probe_file import load_probe
from engine.train_predictor import train_predictor
from kernels.quant.formats import FORMATS
from tests.engine.conftest import greedy, run_all, tokens_of
from tests.engine.test_models import random_prompt
from tests.engine.tiny_models import make_checkpoint


def config_of(directory, tmp_path, **kwargs) -> EngineConfig:
    cache = CacheConfig(format="float32", packed_dir=tmp_path, **kwargs)
    return EngineConfig(model=directory, kv_memory_nbytes=16 * 1024**2, max_model_len=256, cache=cache)


def test_what_is_learned_is_kept_beside_the_experts_served_and_changes_no_token(checkpoint, make_engine, tmp_path):
    directory, _ = checkpoint("olmoe")
    options = {"packed_dir": tmp_path, "memory_nbytes": 8 * FORMATS["float32"].layout(64, 32).nbytes}
    with pytest.raises(ConfigError, match="run `foregate train-predictor` first"):
        make_engine(directory, cache={**options, "predictor": "probe"})
    prompts = [f"{word} {number}" for word in ("tell", "ask", "say") for number in range(8)]
    learned = train_predictor(config_of(directory, tmp_path), prompts=prompts, max_tokens=1500)
    assert {path.parent for path in learned.paths} == {tmp_path / directory.name}
    assert [recall.distance for recall in learned.probe] == [1]  # of two layers
    chance = 3 / 8
    assert learned.probe[0].probe > chance + 0.1
    assert learned.path > chance + 0.1
    requests = {"a": (random_prompt(20, seed=3), greedy(16))}
    expected = tokens_of(run_all(make_engine(directory), requests)["a"])
    for predictor in ("probe", "path", "auto"):
        engine = make_engine(directory, cache={**options, "predictor": predictor})
        assert tokens_of(run_all(engine, requests)["a"]) == expected


def test_what_another_model_learned_is_not_used(checkpoint, tmp_path):
    directory, _ = checkpoint("olmoe")
    (probe, path), *_ = train_predictor(config_of(directory, tmp_path), prompts=list("abcdefghijk"), max_tokens=1200)
    mine = Checkpoint(directory)
    assert load_probe(probe, mine, 2) is not None
    assert load_path_router(path, mine) is not None
    (tmp_path / "other").mkdir()
    make_checkpoint(tmp_path / "other", "qwen3")
    assert load_probe(probe, Checkpoint(tmp_path / "other"), 2) is None
    assert load_path_router(path, Checkpoint(tmp_path / "other")) is None


def test_too_few_prompts_are_refused(checkpoint, tmp_path):
    with pytest.raises(ConfigError, match="too few prompts"):
        train_predictor(config_of(checkpoint("olmoe")[0], tmp_path), prompts=["a b c"], max_tokens=300)


def test_a_model_without_experts_is_refused(checkpoint, tmp_path):
    with pytest.raises(ConfigError, match="nothing to foretell"):
        train_predictor(config_of(checkpoint("llama-llama3-rope")[0], tmp_path))
