"""Small random checkpoints of each family, made with transformers' own classes, and what those classes compute."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    OlmoeConfig,
    OlmoeForCausalLM,
    PreTrainedTokenizerFast,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

VOCAB_SIZE = 272  # 256 bytes, then specials, then a few ids that no text gives
EOS_ID = 256
CHAT_TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)

_COMMON = {
    "vocab_size": VOCAB_SIZE,
    "bos_token_id": None,
    "eos_token_id": EOS_ID,
    "pad_token_id": None,
    "initializer_range": 0.2,  # large enough that greedy tokens vary and a wrong term shows
}


def _mixtral(**kwargs: Any) -> torch.nn.Module:
    return MixtralForCausalLM(MixtralConfig(**{**_COMMON, "num_local_experts": 4, **kwargs}))


def _olmoe(**kwargs: Any) -> torch.nn.Module:
    return OlmoeForCausalLM(OlmoeConfig(**{**_COMMON, "num_experts": 8, "num_experts_per_tok": 3, **kwargs}))


def _qwen3(**kwargs: Any) -> torch.nn.Module:
    defaults = {"num_experts": 8, "num_experts_per_tok": 3, "moe_intermediate_size": 32, "norm_topk_prob": True}
    return Qwen3MoeForCausalLM(Qwen3MoeConfig(**{**_COMMON, **defaults, **kwargs}))


def _llama(**kwargs: Any) -> torch.nn.Module:
    return LlamaForCausalLM(LlamaConfig(**{**_COMMON, **kwargs}))


def _shape(hidden: int, inner: int, layers: int, heads: int, kv_heads: int, **more: Any) -> dict[str, Any]:
    return {
        "hidden_size": hidden,
        "intermediate_size": inner,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        **more,
    }


VARIANTS: dict[str, tuple[Callable[..., torch.nn.Module], dict[str, Any]]] = {
    "mixtral": (_mixtral, _shape(64, 96, 2, 4, 2)),
    "mixtral-mha-tied": (_mixtral, _shape(64, 32, 3, 4, 4, tie_word_embeddings=True, num_experts_per_tok=1)),
    "mixtral-linear-rope": (
        _mixtral,
        _shape(64, 32, 1, 2, 1, rope_parameters={"rope_type": "linear", "factor": 2.0, "rope_theta": 10000.0}),
    ),
    "olmoe": (_olmoe, _shape(64, 32, 2, 4, 4)),
    "olmoe-gqa-clip": (_olmoe, _shape(96, 32, 2, 6, 2, clip_qkv=1.0, norm_topk_prob=True)),
    "olmoe-tied": (_olmoe, _shape(64, 64, 2, 4, 2, tie_word_embeddings=True)),
    "qwen3": (_qwen3, _shape(64, 96, 2, 4, 2, head_dim=32)),
    "qwen3-dense-layers-tied": (
        _qwen3,
        _shape(96, 128, 4, 4, 1, head_dim=16, mlp_only_layers=[0], decoder_sparse_step=2, tie_word_embeddings=True),
    ),
    "qwen3-bias-unnormalised": (
        _qwen3,
        _shape(64, 64, 2, 4, 4, head_dim=16, attention_bias=True, norm_topk_prob=False),
    ),
    "llama-llama3-rope": (
        _llama,
        _shape(
            64,
            96,
            2,
            4,
            2,
            rope_parameters={
                "rope_type": "llama3",
                "rope_theta": 10000.0,
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 64,
            },
            max_position_embeddings=512,
        ),
    ),
}


def save_tokenizer(directory: Path) -> None:
    """A byte-level tokenizer: the id of a byte is the byte, so any text is known and ids are easy to read."""
    alphabet = {chr_: byte for byte, chr_ in _byte_alphabet().items()}
    tokenizer = Tokenizer(models.BPE(vocab=alphabet, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<|im_end|>", "<|im_start|>"])
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|im_end|>")
    fast.add_special_tokens({"additional_special_tokens": ["<|im_start|>"]})
    fast.chat_template = CHAT_TEMPLATE
    fast.save_pretrained(directory)


def _byte_alphabet() -> dict[int, str]:
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    return {**{b: chr(b) for b in printable}, **{b: chr(256 + i) for i, b in enumerate(others)}}


def make_checkpoint(directory: Path, variant: str, seed: int = 0, **overrides: Any) -> torch.nn.Module:
    """Write a checkpoint of the variant and return transformers' own model of it, float32, in eval mode."""
    make, kwargs = VARIANTS[variant]
    torch.manual_seed(seed)
    model = make(**{**kwargs, **overrides}).eval()
    model.save_pretrained(directory)
    save_tokenizer(directory)
    return model


@torch.inference_mode()
def reference_logits(model: torch.nn.Module, token_ids: list[int]) -> torch.Tensor:
    """float32 logits [T, V] of every position by transformers."""
    return model(torch.tensor([token_ids])).logits[0]


@torch.inference_mode()
def reference_greedy(model: torch.nn.Module, token_ids: list[int], num_tokens: int) -> list[int]:
    """Greedy continuation by transformers' `generate`, with its own KV cache; end-of-sequence does not stop it."""
    output = model.generate(
        torch.tensor([token_ids]),
        attention_mask=torch.ones(1, len(token_ids), dtype=torch.int64),
        max_new_tokens=num_tokens,
        do_sample=False,
        eos_token_id=-1,
        pad_token_id=0,
    )
    return output[0, len(token_ids) :].tolist()
