"""What a damaged, incomplete or unknown checkpoint is answered with."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from engine.checkpoint import Checkpoint
from engine.errors import CheckpointError


@pytest.fixture
def directory(checkpoint, tmp_path: Path) -> Path:
    source, _ = checkpoint("olmoe")
    return Path(shutil.copytree(source, tmp_path / "model", ignore=shutil.ignore_patterns("foregate")))


def edit_config(directory: Path, **changes: object) -> None:
    path = directory / "config.json"
    config = json.loads(path.read_text())
    config.update(changes)
    path.write_text(json.dumps({k: v for k, v in config.items() if v != "absent"}))


def shard(directory: Path) -> list[Path]:
    """Split the weights in two shards with an index."""
    tensors = load_file(directory / "model.safetensors")
    names = sorted(tensors)
    parts = {"model-00001-of-00002.safetensors": names[::2], "model-00002-of-00002.safetensors": names[1::2]}
    for file, part in parts.items():
        save_file({name: tensors[name] for name in part}, directory / file)
    index = {"weight_map": {name: file for file, part in parts.items() for name in part}}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))
    (directory / "model.safetensors").unlink()
    return [directory / file for file in parts]


def test_a_sharded_checkpoint_reads_as_the_whole_one(directory: Path):
    whole = load_file(directory / "model.safetensors")
    shard(directory)
    opened = Checkpoint(directory)
    for name, tensor in whole.items():
        assert torch.equal(opened.tensor(name, tuple(tensor.shape)), tensor)


def test_a_missing_shard_is_named(directory: Path):
    shard(directory)[1].unlink()
    with pytest.raises(CheckpointError, match=r"shard model-00002-of-00002.safetensors is missing; download"):
        Checkpoint(directory)


def test_a_truncated_shard_is_named(directory: Path):
    path = shard(directory)[0]
    path.write_bytes(path.read_bytes()[:-1000])
    with pytest.raises(CheckpointError, match=r"shard model-00001-of-00002.safetensors is damaged"):
        Checkpoint(directory)


def test_a_tensor_that_only_the_index_knows_is_named(directory: Path):
    shard(directory)
    path = directory / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    index["weight_map"]["model.layers.9.ghost"] = "model-00001-of-00002.safetensors"
    path.write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match=r"model\.layers\.9\.ghost, which is in none"):
        Checkpoint(directory)


def test_a_tensor_of_another_shape_is_named(directory: Path):
    edit_config(directory, vocab_size=100)
    with pytest.raises(
        CheckpointError, match=r"model.embed_tokens.weight is \(272, 64\), config.json implies \(100, 64\)"
    ):
        Checkpoint(directory).tensor("model.embed_tokens.weight", (100, 64))


def test_a_directory_that_is_none_or_no_model_is_refused(tmp_path: Path):
    with pytest.raises(CheckpointError, match="does not exist"):
        Checkpoint(tmp_path / "nowhere")
    with pytest.raises(CheckpointError, match=r"no config\.json"):
        Checkpoint(tmp_path)


def test_a_directory_without_weights_is_refused(directory: Path):
    (directory / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"has no model\.safetensors"):
        Checkpoint(directory)


def test_an_unknown_architecture_is_answered_with_the_known_ones(directory: Path):
    edit_config(directory, model_type="gpt2")
    with pytest.raises(CheckpointError, match=r"'gpt2' is not known; known: foregate_llama_moe, llama, mixtral"):
        Checkpoint(directory)


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"hidden_act": "gelu"}, "activation 'gelu'"),
        (
            {"rope_parameters": {"rope_type": "yarn", "factor": 4.0, "rope_theta": 1e4}},
            "rotary embedding of type 'yarn'",
        ),
        ({"num_experts_per_tok": 99}, "99 active of 8 experts"),
        ({"num_key_value_heads": 3}, "not a multiple of 3 KV heads"),
    ],
)
def test_what_is_not_supported_is_refused_by_name(directory: Path, changes: dict, why: str):
    edit_config(directory, **changes)
    with pytest.raises(CheckpointError, match=why):
        Checkpoint(directory)


@pytest.mark.parametrize("content", ["", "{", "[]", "null", '"text"'])
def test_a_config_that_is_not_json_is_refused(directory: Path, content: str):
    (directory / "config.json").write_text(content)
    with pytest.raises(CheckpointError, match=r"config\.json"):
        Checkpoint(directory)


def test_the_fingerprint_tells_checkpoints_apart_and_is_the_same_anywhere(checkpoint, directory: Path, tmp_path: Path):
    first = Checkpoint(directory).fingerprint
    moved = Path(shutil.copytree(directory, tmp_path / "elsewhere"))
    assert Checkpoint(moved).fingerprint == first
    tensors = load_file(moved / "model.safetensors")
    tensors["model.norm.weight"] += 1.0
    save_file(tensors, moved / "model.safetensors", metadata={"format": "pt"})
    assert Checkpoint(moved).fingerprint != first


def test_a_window_shortens_the_context_instead_of_being_ignored(directory: Path):
    edit_config(directory, model_type="mixtral", num_local_experts=8, sliding_window=32)
    assert Checkpoint(directory).spec.max_position_embeddings == 32
