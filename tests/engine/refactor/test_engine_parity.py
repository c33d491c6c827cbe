"""A refactored checkpoint served by the engine, against the plain twin of it and against the dense model."""

from __future__ import annotations

import json
import random
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from engine.refactor.plan import SplitSettings
from engine.refactor.source import open_source
from engine.refactor.write import write_checkpoint
from tests.engine.conftest import MakeEngine, greedy, run_all, tokens_of
from tests.engine.refactor.conftest import MakeLlama
from tests.engine.refactor.moe_twin import load_twin
from tests.engine.refactor.test_write import random_plan
from tests.engine.test_models import all_logits
from tests.engine.tiny_models import reference_greedy, reference_logits

SETTINGS = SplitSettings(num_experts=4, shared_size=32, num_active=3)  # 4 experts of 32 out of 160 neurons


@pytest.fixture(
    params=[({}, ()), ({"tie_word_embeddings": False, "num_key_value_heads": 4}, ()), ({}, (0, 2))],
    ids=["tied", "untied", "dense-layers"],
)
def refactored(request: pytest.FixtureRequest, make_llama: MakeLlama, tmp_path: Path):
    overrides, dense_layers = request.param
    path, dense = make_llama(intermediate_size=160, **overrides)
    source = open_source(path)
    plan = random_plan(source, replace(SETTINGS, dense_layers=dense_layers))
    write_checkpoint(source, plan, tmp_path / "moe", dtype="float32")
    prompt = random.Random(0).choices(range(source.config.vocab_size), k=60)
    return tmp_path / "moe", dense, prompt


@pytest.mark.parametrize("chunk", [1, 7, 1000])
def test_logits_equal_those_of_the_twin(refactored, make_engine: MakeEngine, chunk: int):
    path, _, prompt = refactored
    expected = reference_logits(load_twin(path), prompt)
    assert expected.std() > 0.1
    torch.testing.assert_close(all_logits(make_engine(path), prompt, chunk), expected, atol=1e-3, rtol=0)


def test_64_greedy_tokens_equal_those_of_the_twin(refactored, make_engine: MakeEngine):
    path, _, prompt = refactored
    outputs = run_all(make_engine(path), {"a": (prompt, greedy(64))})["a"]
    assert tokens_of(outputs) == reference_greedy(load_twin(path), prompt, 64)


def test_with_all_experts_active_the_engine_computes_the_dense_model(refactored, make_engine: MakeEngine):
    path, dense, prompt = refactored
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(config | {"num_experts_per_tok": 4}))
    torch.testing.assert_close(
        all_logits(make_engine(path), prompt, 16), reference_logits(dense, prompt), atol=1e-3, rtol=0
    )
