from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest
import torch
from transformers import LlamaForCausalLM

from engine.errors import CheckpointError, ConfigError
from engine.refactor.plan import LayerPlan, RefactorPlan, SplitSettings
from engine.refactor.source import DenseSource, fingerprint, open_source
from engine.refactor.write import staged_directory, write_checkpoint
from tests.engine.refactor.conftest import MakeLlama
from tests.engine.refactor.moe_twin import load_tensors, load_twin

SETTINGS = SplitSettings(num_experts=4, shared_size=32, num_active=3)  # 4 experts of 16 out of 96 neurons


def random_plan(source: DenseSource, settings: SplitSettings = SETTINGS) -> RefactorPlan:
    generator = torch.Generator().manual_seed(3)
    config = source.config
    layers = [
        LayerPlan(
            torch.randperm(config.intermediate_size, generator=generator),
            torch.randn(settings.num_experts, config.hidden_size, generator=generator),
            torch.randn(settings.num_experts, generator=generator),
        )
        for _ in settings.split_layers(config.num_hidden_layers)
    ]
    return RefactorPlan(settings=settings, source_sha256=fingerprint(source), layers=layers).rounded()


def files(path: Path) -> dict[str, str]:
    return {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in sorted(path.iterdir())}


@torch.inference_mode()
def logits(model: LlamaForCausalLM, tokens: torch.Tensor) -> torch.Tensor:
    return model(tokens).logits


@pytest.mark.parametrize(
    "overrides",
    [
        {},
        {"tie_word_embeddings": False, "num_key_value_heads": 4},
        {"rope_parameters": {"rope_type": "linear", "rope_theta": 5000.0, "factor": 2.0}},
    ],
)
def test_with_every_expert_active_it_is_the_dense_model(make_llama: MakeLlama, tmp_path: Path, overrides: dict) -> None:
    path, dense = make_llama(**overrides)
    source = open_source(path)
    write_checkpoint(source, random_plan(source), tmp_path / "moe", dtype="float32")
    tokens = torch.randint(0, source.config.vocab_size, (2, 40), generator=torch.Generator().manual_seed(1))
    expected = logits(dense, tokens)
    assert expected.std() > 0.1
    all_active = logits(load_twin(tmp_path / "moe", num_active=4), tokens)
    torch.testing.assert_close(all_active, expected, atol=1e-3, rtol=0)
    some_active = logits(load_twin(tmp_path / "moe"), tokens)
    assert (some_active - expected).abs().max() > 0.01


def test_weights_are_rounded_to_bfloat16_and_routers_stay_float32(make_llama: MakeLlama, tmp_path: Path) -> None:
    path, dense = make_llama()
    source = open_source(path)
    plan = random_plan(source)
    write_checkpoint(source, plan, tmp_path / "moe")
    tensors = load_tensors(tmp_path / "moe")
    for name, tensor in tensors.items():
        assert tensor.dtype == (torch.float32 if ".router." in name else torch.bfloat16), name
    down = dense.state_dict()["model.layers.1.mlp.down_proj.weight"].to(torch.bfloat16)
    neurons = plan.layers[1].permutation[32 + 2 * 16 : 32 + 3 * 16]
    assert torch.equal(tensors["model.layers.1.mlp.experts.2.down_proj.weight"], down[:, neurons])
    assert torch.equal(tensors["model.layers.1.mlp.router.weight"], plan.layers[1].router_weight)


def test_the_config_says_what_the_loader_needs(make_llama: MakeLlama, tmp_path: Path) -> None:
    path, _ = make_llama()
    source = open_source(path)
    write_checkpoint(source, random_plan(source), tmp_path / "moe")
    config = json.loads((tmp_path / "moe" / "config.json").read_text())
    wanted = {
        "architectures": ["ForegateLlamaMoeForCausalLM"],
        "model_type": "foregate_llama_moe",
        "hidden_size": 32,
        "intermediate_size": 96,
        "shared_expert_intermediate_size": 32,
        "moe_intermediate_size": 16,
        "num_experts": 4,
        "num_experts_per_tok": 3,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "rms_norm_eps": 1e-5,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
        "max_position_embeddings": 256,
        "tie_word_embeddings": True,
        "hidden_act": "silu",
        "bos_token_id": 1,
        "eos_token_id": 2,
        "torch_dtype": "bfloat16",
    }
    assert {name: config[name] for name in wanted} == wanted


@pytest.mark.parametrize("max_shard_nbytes", [10**9, 20_000])
def test_every_file_comes_out_byte_identical_each_time(
    make_llama: MakeLlama, tmp_path: Path, max_shard_nbytes: int
) -> None:
    path, _ = make_llama()
    for out in ("first", "second"):
        source = open_source(path)
        write_checkpoint(source, random_plan(source), tmp_path / out, max_shard_nbytes=max_shard_nbytes)
    first = files(tmp_path / "first")
    assert first == files(tmp_path / "second")
    assert ("model.safetensors" in first) == (max_shard_nbytes == 10**9)


def test_shards_hold_what_one_file_holds_and_the_index_names_them(make_llama: MakeLlama, tmp_path: Path) -> None:
    path, _ = make_llama()
    source = open_source(path)
    write_checkpoint(source, random_plan(source), tmp_path / "whole")
    write_checkpoint(source, random_plan(source), tmp_path / "cut", max_shard_nbytes=20_000)
    whole, cut = load_tensors(tmp_path / "whole"), load_tensors(tmp_path / "cut")
    assert whole.keys() == cut.keys()
    assert all(torch.equal(whole[name], cut[name]) for name in whole)
    index = json.loads((tmp_path / "cut" / "model.safetensors.index.json").read_text())
    assert index["weight_map"].keys() == whole.keys()
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in whole.values())
    assert len(set(index["weight_map"].values())) > 2
    assert all((tmp_path / "cut" / file).is_file() for file in index["weight_map"].values())


def test_a_plan_survives_its_file_and_damage_is_noticed(make_llama: MakeLlama, tmp_path: Path) -> None:
    path, _ = make_llama()
    plan, file = random_plan(open_source(path)), tmp_path / "plan.safetensors"
    file.write_bytes(plan.to_bytes())
    loaded = RefactorPlan.load(file)
    assert (loaded.settings, loaded.source_sha256) == (plan.settings, plan.source_sha256)
    for ours, theirs in zip(loaded.layers, plan.layers, strict=True):
        assert torch.equal(ours.permutation, theirs.permutation)
        assert torch.equal(ours.router_weight, theirs.router_weight)
        assert torch.equal(ours.router_bias, theirs.router_bias)
    assert loaded.sha256() == plan.sha256() == hashlib.sha256(file.read_bytes()).hexdigest()
    file.write_bytes(file.read_bytes()[:-10])
    with pytest.raises(CheckpointError, match="cannot read the plan"):
        RefactorPlan.load(file)
    with pytest.raises(CheckpointError, match="is not a refactoring plan"):
        RefactorPlan.load(path / "model.safetensors")


def test_a_plan_of_another_model_is_refused_and_nothing_is_written(make_llama: MakeLlama, tmp_path: Path) -> None:
    path, _ = make_llama()
    other, _ = make_llama("other", initializer_range=0.1)
    deeper, _ = make_llama("deeper", num_hidden_layers=4)
    plan = random_plan(open_source(path))
    with pytest.raises(CheckpointError, match="learned from another checkpoint"):
        write_checkpoint(open_source(other), plan, tmp_path / "moe")
    with pytest.raises(CheckpointError, match="3 split layers, the model 4"):
        write_checkpoint(open_source(deeper), plan, tmp_path / "moe")
    twice = LayerPlan(plan.layers[0].permutation.clamp(max=90), *[torch.zeros(4, 32), torch.zeros(4)])
    broken = RefactorPlan(settings=SETTINGS, source_sha256="", layers=[twice] * 3)
    with pytest.raises(CheckpointError, match="not a permutation"):
        write_checkpoint(open_source(path), broken, tmp_path / "moe")
    with pytest.raises(ConfigError, match="unknown dtype 'int3'; known: bfloat16, float32"):
        write_checkpoint(open_source(path), plan, tmp_path / "moe", dtype="int3")
    assert not (tmp_path / "moe").exists()


def test_an_existing_directory_is_not_written_over(make_llama: MakeLlama, tmp_path: Path) -> None:
    path, _ = make_llama()
    source = open_source(path)
    before = files(path)
    with pytest.raises(CheckpointError, match="exists; remove it"):
        write_checkpoint(source, random_plan(source), path)
    assert files(path) == before


@pytest.mark.parametrize("error", [KeyboardInterrupt, MemoryError])
def test_a_stage_that_fails_vanishes_and_what_was_there_stays(tmp_path: Path, error: type[BaseException]) -> None:
    out = tmp_path / "model"
    with staged_directory(out, replace=False) as stage:
        (stage / "file").write_text("first")

    def fail() -> None:
        with staged_directory(out, replace=True) as stage:
            (stage / "file").write_text("second")
            raise error

    with pytest.raises(error):
        fail()
    assert (out / "file").read_text() == "first"
    assert {path.name for path in tmp_path.iterdir()} <= {".model.lock", "model"}


def test_what_a_killed_process_left_behind_is_cleared_away(tmp_path: Path) -> None:
    (tmp_path / ".model.partial").mkdir()
    (tmp_path / ".model.partial" / "stale").write_text("half")
    with staged_directory(tmp_path / "model", replace=False) as stage:
        (stage / "file").write_text("whole")
    assert files(tmp_path / "model").keys() == {"file"}
    assert not (tmp_path / ".model.partial").exists()
