"""How many bytes a model takes, by its shapes alone: nothing is loaded."""

from __future__ import annotations

from engine.checkpoint import Checkpoint
from engine.kv_cache import BLOCK_SIZE, kv_block_nbytes
from engine.loader import ATTENTION_FORMATS, DENSE_FORMATS, kv_dtype
from kernels.quant.blocked import packed_nbytes

_FLOAT_NBYTES = 4
_SPARE_SHARE = 0.1  # of free memory, left alone


def dense_nbytes(checkpoint: Checkpoint, dtype: str) -> int:
    """All weights beside the routed experts, as `engine.loader.load_decoder` keeps them; norms are left out."""
    return streamed_nbytes(checkpoint, dtype) + _embedding_nbytes(checkpoint, dtype)


def streamed_nbytes(checkpoint: Checkpoint, dtype: str) -> int:
    """Of these, what every step reads: all but the table of embeddings."""
    spec = checkpoint.spec
    hidden, moe, format = spec.hidden_size, spec.moe, DENSE_FORMATS[dtype]
    q_size, kv_size = spec.num_heads * spec.head_dim, spec.num_kv_heads * spec.head_dim
    attention_format = ATTENTION_FORMATS[dtype]
    attention = packed_nbytes(attention_format, q_size + 2 * kv_size, hidden)
    attention += packed_nbytes(attention_format, hidden, q_size)
    total = spec.num_layers * attention + packed_nbytes(format, spec.vocab_size, hidden)
    moe_layers = moe.layers if moe is not None else ()
    if len(moe_layers) < spec.num_layers:
        total += (spec.num_layers - len(moe_layers)) * _mlp(format, int(checkpoint.config["intermediate_size"]), hidden)
    if moe is not None:
        total += len(moe.layers) * packed_nbytes("float32", moe.num_experts, hidden)
        if moe.shared_mlp is not None:
            size = int(checkpoint.config["shared_expert_intermediate_size"])
            total += len(moe.layers) * _mlp(format, size, hidden)
    if spec.pregate is not None:  # float32, a few megabytes
        total += spec.pregate.num_layers * _mlp("float32", spec.pregate.intermediate_size, spec.pregate.hidden_size)
    return total


def room_for_experts(free_nbytes: int, kv_nbytes: int, dense_nbytes: int) -> int:
    """Bytes that experts may take beside keys and values and the other weights."""
    return int((free_nbytes - kv_nbytes - dense_nbytes) * (1 - _SPARE_SHARE))


def kv_token_nbytes(checkpoint: Checkpoint, dtype: str) -> float:
    """Keys and values of one token in all layers."""
    return kv_block_nbytes(checkpoint.spec, kv_dtype(dtype)) / BLOCK_SIZE


def _embedding_nbytes(checkpoint: Checkpoint, dtype: str) -> int:
    spec = checkpoint.spec
    return spec.vocab_size * spec.hidden_size * (_FLOAT_NBYTES if dtype == "float32" else 2)


def _mlp(format: str, size: int, hidden_size: int) -> int:
    return packed_nbytes(format, 2 * size, hidden_size) + packed_nbytes(format, hidden_size, size)
