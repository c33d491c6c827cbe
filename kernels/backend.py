"""The one door to arithmetic: what the engine's layers ask for, computed natively or by the reference."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from kernels.quant.layout import RecordLayout

_log = logging.getLogger(__name__)


@dataclass(slots=True)
class AttentionShape:
    """What a layer's attention is, the same for every call."""

    num_heads: int
    num_kv_heads: int
    head_dim: int
    qk_norm: str  # none, head (each head), full (all heads together)
    eps: float
    clip: float | None
    q_norm: Tensor | None  # float32 [D] or [heads * D]
    k_norm: Tensor | None
    cos: Tensor  # float32 [positions, D]
    sin: Tensor


@dataclass(slots=True)
class Sequences:
    """The rows of one step: sequence s owns rows row_begin[s]..row_begin[s + 1], the last of its context[s] tokens.

    All int32; its KV is in the blocks blocks[block_begin[s]..block_begin[s + 1]].
    """

    positions: Tensor  # [T]
    slots: Tensor  # [T] block * 16 + offset, where each row's KV goes
    row_begin: Tensor  # [S + 1]
    context: Tensor  # [S]
    block_begin: Tensor  # [S + 1]
    blocks: Tensor


@dataclass(slots=True)
class Routing:
    """Who goes where: ids [T, k] int32 and weights [T, k], and the positions (token * k + rank) of each expert."""

    ids: Tensor
    weights: Tensor
    experts: list[int]  # distinct, ascending
    row_begin: Tensor  # int32 [experts + 1] into positions
    positions: Tensor  # int32 [T * k]

    def tokens_of(self, expert: int) -> list[int]:
        """The rows that are routed to an expert."""
        i = self.experts.index(expert)
        at = self.positions[int(self.row_begin[i]) : int(self.row_begin[i + 1])]
        tokens: list[int] = (at // self.ids.shape[1]).tolist()
        return tokens


class Linear(Protocol):
    """A matrix made ready for products."""

    def __call__(self, x: Tensor, add_to: Tensor | None = None) -> Tensor:
        """x float32 [n, K] -> [n, N], added in place to `add_to` [n, N] where that is given."""
        ...


class Backend(Protocol):
    """All float32 in and out. Results do not depend on how many rows a call has."""

    name: str

    def make_linear(self, weight: Tensor, bias: Tensor | None, format: str) -> Linear:
        """Pack a weight [N, K] in the given format."""
        ...

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor: ...

    def attend(self, shape: AttentionShape, qkv: Tensor, keys: Tensor, values: Tensor, sequences: Sequences) -> Tensor:
        """qkv [T, (heads + 2 kv_heads) * D] -> [T, heads * D]; the new keys and values go to the paged cache first."""
        ...

    def route(self, logits: Tensor, num_active: int, routing: str) -> Routing: ...

    def expert_mlp(
        self, x: Tensor, routing: Routing, experts: Sequence[tuple[int, Tensor]], layout: RecordLayout, out: Tensor
    ) -> None:
        """Compute the given (expert id, record) for the tokens routed to them, from where the records lie; each
        (token, rank) product is written to its own row of out [T * k, H], for `combine`.
        """
        ...

    def combine(self, outputs: Tensor, weights: Tensor, add_to: Tensor) -> None:
        """outputs [T * k, H] in routing order times weights [T, k], added to add_to [T, H]."""
        ...

    def swiglu(self, gate_up: Tensor) -> Tensor:
        """gate_up [T, 2 I] -> silu(gate) * up [T, I]."""
        ...


def _native(num_threads: int) -> Backend:
    from kernels.cpu.native import NativeBackend

    return NativeBackend(num_threads)


def _reference(num_threads: int) -> Backend:
    from kernels.torch_backend import TorchBackend

    return TorchBackend()


BACKENDS: dict[str, Callable[[int], Backend]] = {"native": _native, "reference": _reference}


def choose_backend(name: str, num_threads: int) -> Backend:
    """The backend of that name; `auto` is native, or, loudly, the reference where that was not built.

    Raises `ValueError` for an unknown name, `RuntimeError` if the named one cannot run here.
    """
    if name == "auto":
        try:
            return BACKENDS["native"](num_threads)
        except RuntimeError as error:
            _log.warning("SLOW: running on the reference kernels (%s)", error)
            return BACKENDS["reference"](num_threads)
    if name not in BACKENDS:
        raise ValueError(f"unknown kernels {name!r}; known: auto, {', '.join(BACKENDS)}")
    return BACKENDS[name](num_threads)
