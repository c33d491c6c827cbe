"""Tiny random Llamas, as Hugging Face directories and as .gguf files."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

TEXT = [
    "The quick brown fox jumps over the lazy dog.",
    "Foregate serves mixture of experts models from a small machine, 24 hours a day.",
    "What is the capital of France? The capital of France is Paris.",
    "Numbers like 1, 22, 333 and 2025 are split into digits.",
]
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
TEMPLATE = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)

MakeLlama = Callable[..., tuple[Path, LlamaForCausalLM]]


def byte_level_bpe(vocab_size: int) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
        ]
    )
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=SPECIAL,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(TEXT * 4, trainer)
    return tokenizer


@pytest.fixture(scope="session")
def bpe() -> Tokenizer:
    return byte_level_bpe(320)


@pytest.fixture
def make_llama(tmp_path: Path, bpe: Tokenizer) -> MakeLlama:
    """make_llama(**overrides) -> (checkpoint directory, the transformers model it was saved from)."""

    def make(name: str = "dense", max_shard_size: str = "5GB", **overrides: Any) -> tuple[Path, LlamaForCausalLM]:
        torch.manual_seed(0)
        settings: dict[str, Any] = {
            "vocab_size": bpe.get_vocab_size(),
            "hidden_size": 32,
            "intermediate_size": 96,
            "num_hidden_layers": 3,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "max_position_embeddings": 256,
            "rms_norm_eps": 1e-5,
            "tie_word_embeddings": True,
            "initializer_range": 0.2,
            "bos_token_id": 1,
            "eos_token_id": 2,
        }
        model = LlamaForCausalLM(LlamaConfig(**settings | overrides)).eval()
        for parameter_name, parameter in model.named_parameters():
            if parameter_name.endswith("norm.weight"):  # transformers starts them at one, which hides mistakes
                torch.nn.init.uniform_(parameter, 0.5, 1.5)
        path = tmp_path / name
        model.save_pretrained(path, max_shard_size=max_shard_size)
        bpe.save(str(path / "tokenizer.json"))
        (path / "tokenizer_config.json").write_text('{"bos_token": "<|im_start|>", "eos_token": "<|im_end|>"}')
        return path, model

    return make


def llama_cpp_rows(weight: Tensor, num_heads: int) -> Tensor:
    """q or k rows as llama.cpp's converter orders them (its `LlamaModel.permute`)."""
    return (
        weight.reshape(num_heads, 2, weight.shape[0] // num_heads // 2, *weight.shape[1:])
        .swapaxes(1, 2)
        .reshape(weight.shape)
    )


def write_gguf(
    path: Path,
    model: LlamaForCausalLM,
    tokenizer: Tokenizer,
    *,
    pre: str = "smollm",
    add_bos: bool = False,
    architecture: str = "llama",
    quantised: gguf.GGMLQuantizationType | None = None,
) -> Path:
    """The model as llama.cpp's converter would write it, in float32 or with the FFN's weights quantised."""
    config, state = model.config, model.state_dict()
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_vocab_size(config.vocab_size)
    vocabulary = sorted(tokenizer.get_vocab().items(), key=lambda item: item[1])
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list([token for token, _ in vocabulary])
    writer.add_token_types([3 if token in SPECIAL else 1 for token, _ in vocabulary])
    writer.add_token_merges([" ".join(merge) for merge in _merges(tokenizer)])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(0)
    writer.add_pad_token_id(2)
    writer.add_add_bos_token(add_bos)
    writer.add_chat_template(TEMPLATE)

    def add(name: str, weight: Tensor) -> None:
        values = np.ascontiguousarray(weight.float().numpy())
        if quantised is not None and ".ffn_" in name and "norm" not in name:
            writer.add_tensor(name, gguf.quants.quantize(values, quantised), raw_dtype=quantised)
        else:
            writer.add_tensor(name, values)

    add("token_embd.weight", state["model.embed_tokens.weight"])
    add("output_norm.weight", state["model.norm.weight"])
    if not config.tie_word_embeddings:
        add("output.weight", state["lm_head.weight"])
    for layer in range(config.num_hidden_layers):
        ours, theirs = f"model.layers.{layer}.", f"blk.{layer}."
        q, k = state[f"{ours}self_attn.q_proj.weight"], state[f"{ours}self_attn.k_proj.weight"]
        add(f"{theirs}attn_norm.weight", state[f"{ours}input_layernorm.weight"])
        add(f"{theirs}attn_q.weight", llama_cpp_rows(q, config.num_attention_heads))
        add(f"{theirs}attn_k.weight", llama_cpp_rows(k, config.num_key_value_heads))
        add(f"{theirs}attn_v.weight", state[f"{ours}self_attn.v_proj.weight"])
        add(f"{theirs}attn_output.weight", state[f"{ours}self_attn.o_proj.weight"])
        add(f"{theirs}ffn_norm.weight", state[f"{ours}post_attention_layernorm.weight"])
        for name in ("gate", "up", "down"):
            add(f"{theirs}ffn_{name}.weight", state[f"{ours}mlp.{name}_proj.weight"])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _merges(tokenizer: Tokenizer) -> list[tuple[str, str]]:
    import json

    merges = json.loads(tokenizer.to_str())["model"]["merges"]
    return [tuple(merge) for merge in merges]
