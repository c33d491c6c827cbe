from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer

from engine.errors import CheckpointError
from engine.refactor.dense import DenseLayer, Rotary, attend, embed, token_log_likelihoods
from engine.refactor.llama_config import llama_config
from engine.refactor.source import DenseSource, fingerprint, open_source
from kernels.reference import rms_norm
from tests.engine.refactor.conftest import MakeLlama, write_gguf

LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}


@torch.inference_mode()
def log_likelihoods(source: DenseSource, tokens: torch.Tensor) -> torch.Tensor:
    config = source.config
    hidden, rotary = embed(source, tokens), Rotary.build(config, tokens.shape[1])
    for index in range(config.num_hidden_layers):
        layer = DenseLayer.load(source, index)
        hidden = attend(hidden, layer, config, rotary)
        hidden = hidden + layer.neurons(rms_norm(hidden, layer.post_norm, config.rms_norm_eps)) @ layer.down.T
    return torch.stack(list(token_log_likelihoods(source, hidden, tokens, rows=7)))


@pytest.mark.parametrize(
    "overrides",
    [
        {},
        {"tie_word_embeddings": False, "num_key_value_heads": 4},
        {"num_key_value_heads": 1, "head_dim": 16},
        {"rope_parameters": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 2.0}},
        {"rope_parameters": LLAMA3_ROPE},
        {"max_shard_size": "20KB"},
    ],
)
def test_the_layerwise_dense_forward_agrees_with_transformers(make_llama: MakeLlama, overrides: dict) -> None:
    path, model = make_llama(**overrides)
    source = open_source(path)
    tokens = torch.randint(0, source.config.vocab_size, (2, 70), generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        expected = model(tokens).logits.log_softmax(-1)[:, :-1].gather(2, tokens[:, 1:, None])[..., 0]
    torch.testing.assert_close(log_likelihoods(source, tokens), expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("tied", [True, False])
def test_a_gguf_file_means_the_same_model_as_the_directory(
    make_llama: MakeLlama, bpe: Tokenizer, tmp_path: Path, tied: bool
) -> None:
    path, model = make_llama(tie_word_embeddings=tied)
    directory, file = open_source(path), open_source(write_gguf(tmp_path / "m.gguf", model, bpe))
    assert file.config == directory.config
    assert file.names == directory.names
    for name in sorted(directory.names):
        assert torch.equal(file.tensor(name), directory.tensor(name)), name
    assert fingerprint(file) == fingerprint(directory)


def test_q4_1_blocks_of_a_gguf_are_dequantised(make_llama: MakeLlama, bpe: Tokenizer, tmp_path: Path) -> None:
    import gguf

    path, model = make_llama()
    wanted = open_source(path).tensor("model.layers.1.mlp.down_proj.weight")
    file = write_gguf(tmp_path / "m.gguf", model, bpe, quantised=gguf.GGMLQuantizationType.Q4_1)
    found = open_source(file).tensor("model.layers.1.mlp.down_proj.weight")
    step = (wanted.max() - wanted.min()) / 15
    assert 0 < (found - wanted).abs().max() < step


def test_a_truncated_gguf_is_a_clear_error(make_llama: MakeLlama, bpe: Tokenizer, tmp_path: Path) -> None:
    _, model = make_llama()
    whole = write_gguf(tmp_path / "m.gguf", model, bpe).read_bytes()
    for nbytes in (0, 3, 20, 100, 1000, len(whole) // 2, len(whole) - 1):
        short = tmp_path / "short.gguf"
        short.write_bytes(whole[:nbytes])
        with pytest.raises(CheckpointError, match="damaged or not a GGUF"):
            open_source(short)


def test_an_unknown_architecture_is_refused_with_the_known_one() -> None:
    with pytest.raises(CheckpointError, match=r"'MixtralForCausalLM'; known: LlamaForCausalLM"):
        llama_config({"architectures": ["MixtralForCausalLM"]}, "config.json")
    with pytest.raises(CheckpointError, match="rope scaling 'yarn'"):
        llama_config(
            {
                "architectures": ["LlamaForCausalLM"],
                "hidden_size": 8,
                "intermediate_size": 8,
                "num_attention_heads": 1,
                "num_hidden_layers": 1,
                "vocab_size": 8,
                "rope_scaling": {"type": "yarn"},
            },
            "config.json",
        )
    with pytest.raises(CheckpointError, match="mlp_bias=True"):
        llama_config({"architectures": ["LlamaForCausalLM"], "mlp_bias": True}, "config.json")


def test_a_gguf_of_another_architecture_is_refused(make_llama: MakeLlama, bpe: Tokenizer, tmp_path: Path) -> None:
    _, model = make_llama()
    file = write_gguf(tmp_path / "m.gguf", model, bpe, architecture="qwen2")
    with pytest.raises(CheckpointError, match=r"'qwen2'; known: LlamaForCausalLM"):
        open_source(file)


def test_missing_and_damaged_files_are_clear_errors(make_llama: MakeLlama, tmp_path: Path) -> None:
    path, _ = make_llama(max_shard_size="20KB")
    shard = sorted(path.glob("model-*.safetensors"))[1]
    content = shard.read_bytes()
    shard.unlink()
    with pytest.raises(CheckpointError, match=f"missing shard.*{shard.name}"):
        open_source(path)
    shard.write_bytes(content[:-100])
    source = open_source(path)
    index = json.loads((path / "model.safetensors.index.json").read_text())
    damaged = next(name for name, file in index["weight_map"].items() if file == shard.name)
    with pytest.raises(CheckpointError, match="cannot read"):
        source.tensor(damaged)
    (path / "config.json").write_text("{")
    with pytest.raises(CheckpointError, match="not valid JSON"):
        open_source(path)
    with pytest.raises(CheckpointError, match="neither a checkpoint directory nor"):
        open_source(tmp_path / "nowhere")
