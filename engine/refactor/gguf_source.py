"""A dense Llama in a .gguf file: metadata and tensors under Hugging Face's names, de-quantised to float32."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from torch import Tensor

from engine.errors import CheckpointError
from engine.refactor.gguf_tokenizer import write_tokenizer_files
from engine.refactor.llama_config import LlamaConfig, llama_config

_GLOBAL_NAMES = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
_LAYER_NAMES = {
    "attn_norm.weight": "input_layernorm.weight",
    "attn_q.weight": "self_attn.q_proj.weight",
    "attn_k.weight": "self_attn.k_proj.weight",
    "attn_v.weight": "self_attn.v_proj.weight",
    "attn_output.weight": "self_attn.o_proj.weight",
    "ffn_norm.weight": "post_attention_layernorm.weight",
    "ffn_gate.weight": "mlp.gate_proj.weight",
    "ffn_up.weight": "mlp.up_proj.weight",
    "ffn_down.weight": "mlp.down_proj.weight",
}


class GgufSource:
    """Implements `engine.refactor.source.DenseSource`."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            reader = gguf.GGUFReader(path)
            self.metadata: dict[str, Any] = {key: field.contents() for key, field in reader.fields.items()}
        # a short or foreign file surfaces in the reader as whichever of these its parsing trips over
        except (ValueError, IndexError, KeyError, TypeError, OSError, OverflowError, MemoryError) as error:
            raise CheckpointError(f"{path} is damaged or not a GGUF file ({error}); fetch it again") from error
        self._tensors = {_hf_name(tensor.name, path): tensor for tensor in reader.tensors}
        self.config = _config(self.metadata, self.names, str(path))

    @property
    def names(self) -> frozenset[str]:
        return frozenset(self._tensors)

    def tensor(self, name: str) -> Tensor:
        if name not in self._tensors:
            raise CheckpointError(f"{self.path}: tensor {name!r} is missing")
        stored = self._tensors[name]
        try:
            values = gguf.quants.dequantize(stored.data, stored.tensor_type)
        except NotImplementedError as error:
            kind = stored.tensor_type.name
            raise CheckpointError(f"{self.path}: {name!r} is in {kind}, which cannot be de-quantised") from error
        tensor = torch.from_numpy(np.array(values, dtype=np.float32))
        if name.endswith("q_proj.weight"):
            return _half_split_rows(tensor, self.config.num_attention_heads)
        if name.endswith("k_proj.weight"):
            return _half_split_rows(tensor, self.config.num_key_value_heads)
        return tensor

    def write_tokenizer(self, out: Path) -> None:
        write_tokenizer_files(self.metadata, out, str(self.path))


def _half_split_rows(weight: Tensor, num_heads: int) -> Tensor:
    """Undo llama.cpp's reordering of q and k rows [heads * D, H] (pairs interleaved) to Hugging Face's halves."""
    rows, width = weight.shape
    half = rows // num_heads // 2
    return weight.view(num_heads, half, 2, width).transpose(1, 2).reshape(rows, width)


def _hf_name(name: str, path: Path) -> str:
    if name in _GLOBAL_NAMES:
        return _GLOBAL_NAMES[name]
    if name.startswith("blk."):
        _, layer, rest = name.split(".", 2)
        if rest in _LAYER_NAMES:
            return f"model.layers.{layer}.{_LAYER_NAMES[rest]}"
    raise CheckpointError(f"{path}: tensor {name!r} does not belong to a plain dense Llama; it cannot be refactored")


def _config(metadata: dict[str, Any], names: frozenset[str], where: str) -> LlamaConfig:
    architecture = metadata.get("general.architecture")
    raw: dict[str, Any] = {"architectures": [architecture], "tie_word_embeddings": "lm_head.weight" not in names}
    if architecture == "llama":
        for key, name in (
            ("embedding_length", "hidden_size"),
            ("feed_forward_length", "intermediate_size"),
            ("block_count", "num_hidden_layers"),
            ("attention.head_count", "num_attention_heads"),
            ("attention.head_count_kv", "num_key_value_heads"),
            ("attention.key_length", "head_dim"),
            ("context_length", "max_position_embeddings"),
            ("rope.freq_base", "rope_theta"),
            ("attention.layer_norm_rms_epsilon", "rms_norm_eps"),
            ("vocab_size", "vocab_size"),
        ):
            if f"llama.{key}" in metadata:
                raw[name] = _short(metadata[f"llama.{key}"])
        raw.setdefault("vocab_size", len(metadata.get("tokenizer.ggml.tokens", ())))
        kind = metadata.get("llama.rope.scaling.type", "none")
        if kind != "none":
            raw["rope_scaling"] = {"rope_type": kind, "factor": _short(metadata.get("llama.rope.scaling.factor", 1.0))}
        raw["bos_token_id"] = metadata.get("tokenizer.ggml.bos_token_id")
        raw["eos_token_id"] = metadata.get("tokenizer.ggml.eos_token_id")
    return llama_config(raw, where)


def _short(value: Any) -> Any:
    """A float32 as the shortest decimal that means it (1e-05, not 9.999999747378752e-06); anything else as it is."""
    return float(str(np.float32(value))) if isinstance(value, float) else value
