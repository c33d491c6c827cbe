"""The one door to arithmetic: what the engine's layers ask for, computed natively or by the reference."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
import torch.nn.functional as F  # noqa: N812
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
    positions: Tensor  # int32 [T * k], ascending for each expert
    num_positions: int

    @classmethod
    def of(cls, ids: Tensor, weights: Tensor) -> Routing:
        """Group the positions by expert."""
        flat = ids.flatten()
        order = flat.argsort(stable=True)
        experts, counts = torch.unique_consecutive(flat[order], return_counts=True)
        return cls(ids, weights, experts.tolist(), F.pad(counts.cumsum(0), (1, 0)).int(), order.int(), len(flat))

    def on_host(self) -> Routing:
        """Itself, or a copy in the CPU's memory."""
        if self.ids.device.type == "cpu":
            return self
        ids, weights, row_begin, positions = (x.cpu() for x in (self.ids, self.weights, self.row_begin, self.positions))
        return Routing(ids, weights, self.experts, row_begin, positions, self.num_positions)

    def copy(self) -> Routing:
        """One that holds when the router is called again."""
        tensors = (self.ids.clone(), self.weights.clone())
        return Routing(*tensors, list(self.experts), self.row_begin.clone(), self.positions.clone(), self.num_positions)

    def tokens_of(self, expert: int) -> list[int]:
        """The rows that are routed to an expert."""
        i = self.experts.index(expert)
        at = self.positions[int(self.row_begin[i]) : int(self.row_begin[i + 1])]
        tokens: list[int] = (at // self.ids.shape[1]).tolist()
        return tokens


class Records:
    """The memory that experts' records lie in: a record of `layout` in each slot."""

    def __init__(self, layout: RecordLayout, slots: Sequence[Tensor]) -> None:
        """`slots` are uint8; raises `ValueError` if one is too short for a record."""
        if any(slot.numel() < layout.nbytes for slot in slots):
            raise ValueError("a slot is shorter than a record")
        self.layout = layout
        self.slots = slots
        self.addresses = [slot.data_ptr() for slot in slots]


@dataclass(frozen=True, slots=True)
class Draw:
    """How a token is chosen from a row of logits; see `kernels.reference.choose`."""

    uniform: float  # in [0, 1)
    temperature: float  # 0: the likeliest
    top_k: int  # 0: all
    top_p: float
    min_p: float
    allowed: Tensor | None = None  # int32 [V / 32], a bit for each token, the lowest first; None: all may come


UNCHOOSABLE = "no token can be chosen: no logit is finite, or one is not a number"


class Choose(Protocol):
    """From logits in the CPU's memory to tokens."""

    def __call__(self, rows: Sequence[Tensor], draws: Sequence[Draw]) -> list[int]:
        """float32 rows [V] of logits, minus infinity for what may not come, and a draw each -> tokens.

        A row's token does not depend on the others. Raises `ValueError` if one has nothing to choose from.
        """
        ...


class Linear(Protocol):
    """A matrix made ready for products."""

    def __call__(self, x: Tensor, add_to: Tensor | None = None) -> Tensor:
        """x float32 [n, K] -> [n, N], added in place to `add_to` [n, N] where that is given."""
        ...


class AttentionKernel(Protocol):
    """Norm, projections, rotation, attention over the paged cache, and output of one layer."""

    def __call__(self, residual: Tensor, keys: Tensor, values: Tensor, sequences: Sequences) -> None:
        """Adds to residual [T, H]; the new tokens' keys and values are written to the cache.

        keys [blocks, kv_heads, D, 16], values [blocks, kv_heads, 16, D]; qkv's rows are q, k, v one below another.
        """
        ...


class RouterKernel(Protocol):
    """Norm, router, and the choice of experts of one layer."""

    def __call__(self, residual: Tensor) -> tuple[Tensor, Routing]:
        """residual [T, H] -> its norm x [T, H], and where each row goes; both hold until a router is called again."""
        ...


class MlpKernel(Protocol):
    """A dense SwiGLU layer."""

    def __call__(self, x: Tensor, residual: Tensor) -> None:
        """Adds the layer's output for x [T, H], normed first if the layer has a norm, to residual [T, H]."""
        ...


class Backend(Protocol):
    """All float32 in and out, on one device. Results do not depend on how many rows a call has."""

    name: str
    device: torch.device  # that all tensors are on, but for weights that are to be packed

    def make_linear(self, weight: Tensor, bias: Tensor | None, format: str) -> Linear:
        """Pack a weight [N, K] in the given format."""
        ...

    def make_attention(self, shape: AttentionShape, norm: Tensor, qkv: Linear, output: Linear) -> AttentionKernel:
        """norm [H], qkv [(heads + 2 kv_heads) * D, H], output [H, heads * D], both made by this backend."""
        ...

    def make_router(self, norm: Tensor, eps: float, router: Linear, num_active: int, routing: str) -> RouterKernel:
        """norm [H], router [E, H] made by this backend; `routing` as in `reference.route`."""
        ...

    def make_mlp(self, norm: Tensor | None, eps: float, gate_up: Linear, down: Linear) -> MlpKernel:
        """norm [H] or None, gate_up [2 I, H] with gate above up, down [H, I], both made by this backend."""
        ...

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor: ...

    def expert_mlp(
        self,
        x: Tensor,
        routing: Routing,
        records: Records,
        ready: Sequence[tuple[int, int]],
        outputs: Tensor,
        add_to: Tensor | None = None,
    ) -> None:
        """Compute the `ready` (expert, slot) for the tokens routed to them, from where the records lie.

        Each (token, rank) product is written to its own row of outputs [T * k, H], for `combine`; which is done at
        once where `add_to` [T, H] is given: then `ready` must be all that was missing, and outputs need not be kept.
        """
        ...

    def combine(self, outputs: Tensor, weights: Tensor, add_to: Tensor) -> None:
        """outputs [T * k, H] in routing order times weights [T, k], added to add_to [T, H]."""
        ...


def _native(num_threads: int) -> Backend:
    from kernels.cpu.native import NativeBackend

    backend = NativeBackend(num_threads)
    _log.info("native kernels: %s, %d threads", backend.isa, num_threads)
    return backend


def _reference(num_threads: int) -> Backend:
    from kernels.torch_backend import TorchBackend

    return TorchBackend()


def _triton(num_threads: int) -> Backend:
    try:
        from kernels.gpu.backend import TritonBackend
    except ImportError as error:
        raise RuntimeError(f"the Triton kernels need triton, which comes with torch for CUDA: {error}") from error
    return TritonBackend()


BACKENDS: dict[str, Callable[[int], Backend]] = {"native": _native, "reference": _reference, "triton": _triton}


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


def make_choose(backend: Backend, num_threads: int) -> Choose:
    """The native kernel; of the reference backend, or where it was not built, the reference."""
    from kernels.torch_backend import choose

    if backend.name == "reference":
        return choose
    try:
        from kernels.cpu.native import NativeBackend

        native = backend if isinstance(backend, NativeBackend) else NativeBackend(num_threads)
    except RuntimeError as error:
        _log.warning("SLOW: tokens are chosen by the reference (%s)", error)
        return choose
    return native.choose
