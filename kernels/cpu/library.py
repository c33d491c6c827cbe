"""The native library as ctypes sees it: the structures of kernels.h and the functions of api.cpp, nothing else."""

from __future__ import annotations

import ctypes
from ctypes import c_char_p, c_double, c_float, c_int, c_int64, c_uint64, c_void_p
from functools import cache
from pathlib import Path

_LIBRARY = Path(__file__).parent / "libforegate.so"


class Routing(ctypes.Structure):
    """See kernels.h: rows of each expert."""

    _fields_ = (("num_experts", c_int), ("experts", c_void_p), ("row_begin", c_void_p), ("positions", c_void_p))


class ExpertCall(ctypes.Structure):
    """One call of the expert kernel."""

    _fields_ = (
        ("format", c_int),
        ("hidden_size", c_int),
        ("intermediate_size", c_int),
        ("x", c_void_p),
        ("num_tokens", c_int),
        ("num_active", c_int),
        ("routing", Routing),
        ("num_ready", c_int),
        ("ready", c_void_p),
        ("records", c_void_p),
        ("out", c_void_p),
        ("residual", c_void_p),
        ("weights", c_void_p),
    )


class LinearCall(ctypes.Structure):
    """One dense product."""

    _fields_ = (
        ("format", c_int),
        ("num_outputs", c_int),
        ("num_inputs", c_int),
        ("weight", c_void_p),
        ("bias", c_void_p),
        ("x", c_void_p),
        ("x_stride", c_int64),
        ("num_rows", c_int),
        ("out", c_void_p),
        ("out_stride", c_int64),
        ("accumulate", c_int),
    )


class AttentionCall(ctypes.Structure):
    """Attention of one layer over the paged cache."""

    _fields_ = (
        ("num_heads", c_int),
        ("num_kv_heads", c_int),
        ("head_dim", c_int),
        ("kv_is_bf16", c_int),
        ("scale", c_float),
        ("query", c_void_p),
        ("keys", c_void_p),
        ("values", c_void_p),
        ("num_seqs", c_int),
        ("row_begin", c_void_p),
        ("context", c_void_p),
        ("block_begin", c_void_p),
        ("blocks", c_void_p),
        ("out", c_void_p),
    )


class QkvCall(ctypes.Structure):
    """What comes between the projections and attention."""

    _fields_ = (
        ("num_heads", c_int),
        ("num_kv_heads", c_int),
        ("head_dim", c_int),
        ("kv_is_bf16", c_int),
        ("norm", c_int),
        ("eps", c_float),
        ("clip", c_float),
        ("q_norm", c_void_p),
        ("k_norm", c_void_p),
        ("cos", c_void_p),
        ("sin", c_void_p),
        ("qkv", c_void_p),
        ("num_rows", c_int),
        ("positions", c_void_p),
        ("slots", c_void_p),
        ("query", c_void_p),
        ("keys", c_void_p),
        ("values", c_void_p),
    )


class Step(ctypes.Structure):
    """The step that all layers share."""

    _fields_ = (
        ("num_rows", c_int),
        ("positions", c_void_p),
        ("slots", c_void_p),
        ("num_seqs", c_int),
        ("row_begin", c_void_p),
        ("context", c_void_p),
        ("block_begin", c_void_p),
        ("blocks", c_void_p),
    )


class AttentionLayer(ctypes.Structure):
    """A layer's attention from norm to output."""

    _fields_ = (
        ("hidden_size", c_int),
        ("eps", c_float),
        ("norm", c_void_p),
        ("qkv", LinearCall),
        ("output", LinearCall),
        ("prepare", QkvCall),
        ("attention", AttentionCall),
    )


class RouterLayer(ctypes.Structure):
    """A layer's norm and router."""

    _fields_ = (
        ("eps", c_float),
        ("norm", c_void_p),
        ("router", LinearCall),
        ("num_active", c_int),
        ("mode", c_int),
    )


class MlpLayer(ctypes.Structure):
    """A dense SwiGLU layer."""

    _fields_ = (("eps", c_float), ("norm", c_void_p), ("gate_up", LinearCall), ("down", LinearCall))


class Draw(ctypes.Structure):
    """How a token is drawn from a row of logits."""

    _fields_ = (
        ("uniform", c_double),
        ("temperature", c_double),
        ("top_p", c_double),
        ("min_p", c_double),
        ("top_k", c_int64),
        ("allowed", c_void_p),
    )


class ChooseCall(ctypes.Structure):
    """The tokens of some rows of logits."""

    _fields_ = (
        ("num_rows", c_int),
        ("vocab_size", c_int),
        ("logits", c_void_p),
        ("draws", c_void_p),
        ("tokens", c_void_p),
    )


FORMATS = {"float32": 0, "bf16": 1, "int8": 2, "int4": 3}  # numbered as in kernels.h


def is_built() -> bool:
    """Whether a compiler was there when Foregate was installed."""
    return _LIBRARY.exists()


@cache
def load_library() -> ctypes.CDLL:
    """The library with its functions' types; raises `RuntimeError` if it was not built."""
    if not is_built():
        raise RuntimeError("the native kernels were not built: install a C++17 compiler and install Foregate again")
    library = ctypes.CDLL(str(_LIBRARY))
    library.foregate_start.argtypes = (c_int, c_char_p)
    library.foregate_isa.restype = c_char_p
    library.foregate_linear.argtypes = (c_void_p,)
    library.foregate_attention.argtypes = (c_void_p, c_void_p, c_void_p)
    library.foregate_route.argtypes = (c_void_p, c_void_p, c_int, *[c_void_p] * 6)
    library.foregate_mlp.argtypes = (c_void_p, c_void_p, c_int, c_void_p)
    library.foregate_expert_mlp.argtypes = (c_void_p,)
    library.foregate_rms_norm.argtypes = (c_void_p, c_void_p, c_float, c_int, c_int, c_void_p)
    library.foregate_combine.argtypes = (c_void_p, c_void_p, c_int, c_int, c_int, c_void_p)
    library.foregate_pack.argtypes = (c_int, c_void_p, c_int, c_int, c_void_p, c_int)
    library.foregate_choose.argtypes = (c_void_p, c_int)
    for name in ("linear", "attention", "mlp", "rms_norm", "combine", "pack", "choose"):
        getattr(library, f"foregate_{name}").restype = None
    library.foregate_read.argtypes = (c_void_p, c_int64)
    library.foregate_read.restype = c_uint64
    return library
