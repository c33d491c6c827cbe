"""What tiles are tried on: every tuned kernel on tensors of one model's shape, checked against the reference, timed."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, cached_property

import torch
from torch import Tensor
from triton.errors import TritonError

from kernels import reference
from kernels.backend import AttentionShape, Routing
from kernels.gpu.attention import PART, AttentionTile, AttentionWork, paged_attention, tokens_a_tile
from kernels.gpu.configs import Tile
from kernels.gpu.experts import ExpertTiles, expert_down, expert_gate_up
from kernels.gpu.grouping import cut_tiles
from kernels.gpu.linear import linear
from kernels.gpu.matrix import PackedMatrix
from kernels.gpu.rounding import round_rows
from kernels.gpu.tune import Trial, Work
from kernels.quant.blocked import pack_matrix, unpack_matrix
from kernels.quant.formats import FORMATS, ExpertWeights

Timer = Callable[[Callable[[], object]], float]  # seconds of one call

_CHECKED_ROWS = 40  # of which every tile must compute the same: several tiles, the last one not full
_MAX_ERROR = 0.02  # of the largest output


@dataclass(frozen=True, slots=True)
class TuneShape:
    """A model's sizes, and how many tokens a step has; by default Qwen3-30B-A3B's."""

    hidden_size: int = 2048
    intermediate_size: int = 768
    num_experts: int = 128
    num_active: int = 8
    num_heads: int = 32
    num_kv_heads: int = 4
    head_dim: int = 128
    decode_rows: int = 16
    prefill_rows: int = 2048
    context: int = 4096

    def num_rows(self, variant: str) -> int:
        return self.decode_rows if variant == "decode" else self.prefill_rows


class TuneWork:
    """Tries tiles; see `kernels.gpu.tune.Try`. Keeps what it computes with, a format's at a time."""

    def __init__(self, shape: TuneShape, device: torch.device, timer: Timer) -> None:
        self._shape = shape
        self._device = device
        self._timer = timer
        self._of_format = cache(self._make)
        self._of_attention = cache(self._make_attention)
        self._kept: str | None = None

    def __call__(self, work: Work, tile: Tile | AttentionTile) -> Trial | None:
        """None for a tile that the GPU cannot start, or whose numbers are not the reference's."""
        try:
            if isinstance(tile, AttentionTile):
                found, expected, run = self._attention(work, tile)
            else:
                found, expected, run = self._product(work, tile)
            if not float((found.cpu() - expected).abs().max()) <= _MAX_ERROR * float(expected.abs().max()):
                return None
            bits = hashlib.blake2b(found.cpu().contiguous().numpy().tobytes(), digest_size=16).hexdigest()
            return Trial(self._timer(run), bits)
        except TritonError:  # too much shared memory, or the compiler gave up
            return None

    def _product(self, work: Work, tile: Tile) -> tuple[Tensor, Tensor, Callable[[], object]]:
        if self._kept != work.format:
            self._of_format.cache_clear()  # a format's experts may take a gigabyte
            self._kept = work.format
        operands = self._of_format(work.format)
        if work.kernel == "linear":
            return operands.linear(work.variant, tile)
        return operands.experts(work.kernel, work.variant, tile)

    def _make(self, format: str) -> _Operands:
        return _Operands(self._shape, format, self._device)

    def _attention(self, work: Work, tile: AttentionTile) -> tuple[Tensor, Tensor, Callable[[], object]]:
        small, large = self._of_attention(work.format, work.variant)
        return small.run(tile), small.expected, lambda: large.run(tile)

    def _make_attention(self, dtype: str, variant: str) -> tuple[_Attention, _Attention]:
        shape, rows = self._shape, self._shape.num_rows(variant)
        small = _Attention(shape, dtype, self._device, [3, 33, 1], [PART + 40, 33, 17])
        if variant == "decode":
            return small, _Attention(shape, dtype, self._device, [1] * rows, [shape.context] * rows)
        return small, _Attention(shape, dtype, self._device, [rows], [max(rows, shape.context // 2)])


class _Operands:
    """Of one format: a dense matrix, and as many experts as the shape has, all with the same weights."""

    def __init__(self, shape: TuneShape, format: str, device: torch.device) -> None:
        generator = torch.Generator().manual_seed(0)
        hidden, inner = shape.hidden_size, shape.intermediate_size
        self._shape, self._format, self._device = shape, format, device
        self._generator = generator
        dense = self._random((shape.num_heads + 2 * shape.num_kv_heads) * shape.head_dim, hidden) * 0.05
        self._matrix = PackedMatrix.pack(dense, format, device)
        self._dense = unpack_matrix(format, pack_matrix(format, dense), *dense.shape)
        self._layout = FORMATS[format].layout(hidden, inner)
        record = torch.zeros(self._layout.nbytes, dtype=torch.uint8)
        shapes = ((inner, hidden), (inner, hidden), (hidden, inner))
        FORMATS[format].pack(ExpertWeights(*(self._random(*each) * 0.05 for each in shapes)), record)
        self._weights = FORMATS[format].unpack(record, self._layout)
        arena = torch.empty(shape.num_experts * self._layout.nbytes + 64, dtype=torch.uint8, device=device)
        self._arena = arena[-arena.data_ptr() % 64 :][: shape.num_experts * self._layout.nbytes]
        self._arena.view(shape.num_experts, -1).copy_(record.to(device).expand(shape.num_experts, -1))

    def linear(self, variant: str, tile: Tile) -> tuple[Tensor, Tensor, Callable[[], object]]:
        x = self._rows(_CHECKED_ROWS, self._shape.hidden_size)
        found = linear(round_rows(x, self._format, is_dense=True), self._matrix, None, tile)
        rows = self._rows(self._shape.num_rows(variant), self._shape.hidden_size)
        many = round_rows(rows, self._format, is_dense=True)
        expected = reference.linear(x.cpu(), self._dense, None, self._format)
        return found, expected, lambda: linear(many, self._matrix, None, tile)

    def experts(self, kernel: str, variant: str, tile: Tile) -> tuple[Tensor, Tensor, Callable[[], object]]:
        checked = self._expert_call(kernel, _CHECKED_ROWS, 1, tile)
        run = self._expert_call(kernel, self._shape.num_rows(variant), self._shape.num_active, tile)
        gate, up, down = self._weights
        if kernel == "expert_gate_up":
            x = self._rows(_CHECKED_ROWS, self._shape.hidden_size).cpu()
            expected = reference.expert_gate_up(x, gate, up, self._format)
        else:
            x = self._rows(_CHECKED_ROWS, self._shape.intermediate_size).cpu()
            expected = reference.expert_down(x, down, self._format)
        return checked(), expected, run

    def _expert_call(self, kernel: str, num_tokens: int, num_active: int, tile: Tile) -> Callable[[], Tensor]:
        """Of that many tokens; with one active expert a token's output is in its own row."""
        shape = self._shape
        experts = 2 if num_active == 1 else shape.num_experts
        generator = torch.Generator().manual_seed(1)
        ids = torch.rand(num_tokens, experts, generator=generator).topk(num_active).indices.int()
        routing = Routing.of(ids.to(self._device), torch.ones(ids.shape, device=self._device))
        chosen = torch.arange(len(routing.experts), dtype=torch.int32, device=self._device)
        offsets = torch.tensor(routing.experts, dtype=torch.int64) * (self._layout.nbytes // 64)
        tiles = cut_tiles(routing.row_begin, chosen, routing.num_positions, tile.rows)
        work = ExpertTiles(tiles, offsets.to(self._device), routing.positions)
        if kernel == "expert_gate_up":
            rows = round_rows(self._rows(num_tokens, shape.hidden_size), self._format)

            def gate_up() -> Tensor:
                sorted_rows = expert_gate_up(rows, work, self._arena, self._layout, num_active, tile)
                if num_active > 1:
                    return sorted_rows
                by_token = torch.empty_like(sorted_rows)
                by_token[routing.positions.long()] = sorted_rows
                return by_token

            return gate_up
        inner = self._rows(routing.num_positions, shape.intermediate_size)
        if num_active == 1:
            inner = inner[routing.positions.long()]  # so that a token's row is its own wherever it is sorted to
        rounded = round_rows(inner, self._format)
        outputs = torch.empty(routing.num_positions, shape.hidden_size, device=self._device)

        def down() -> Tensor:
            expert_down(rounded, work, self._arena, self._layout, tile, outputs)
            return outputs

        return down

    def _rows(self, num_rows: int, num_inputs: int) -> Tensor:
        """The same for the same sizes."""
        return torch.randn(num_rows, num_inputs, generator=torch.Generator().manual_seed(2)).to(self._device)

    def _random(self, *sizes: int) -> Tensor:
        return torch.randn(*sizes, generator=self._generator)


class _Attention:
    """Some sequences with so many new rows each, of so long contexts."""

    def __init__(
        self, shape: TuneShape, dtype_name: str, device: torch.device, rows: list[int], contexts: list[int]
    ) -> None:
        generator = torch.Generator().manual_seed(0)
        dtype = torch.bfloat16 if dtype_name == "bf16" else torch.float32
        num_blocks = [-(-context // 16) for context in contexts]
        sizes = (sum(num_blocks), shape.num_kv_heads)
        cos = torch.empty(0)
        self._shape = AttentionShape(
            shape.num_heads, shape.num_kv_heads, shape.head_dim, "none", 1e-6, None, None, None, cos, cos
        )
        self._keys = torch.randn(*sizes, shape.head_dim, 16, generator=generator).to(dtype)
        self._values = torch.randn(*sizes, 16, shape.head_dim, generator=generator).to(dtype)
        self._query = torch.randn(sum(rows), shape.num_heads, shape.head_dim, generator=generator).to(dtype)
        self._rows, self._contexts = rows, contexts
        self._row_begin = _cumulative(rows)
        self._block_begin = _cumulative(num_blocks)
        self._blocks = torch.randperm(sum(num_blocks), generator=generator).int()
        positions = [torch.arange(end - num, end) for num, end in zip(rows, contexts, strict=True)]
        self._positions = torch.cat(positions).int()
        self._device = device
        self._there = {
            name: getattr(self, name).to(device)
            for name in ("_keys", "_values", "_query", "_row_begin", "_block_begin", "_blocks", "_positions")
        }

    def run(self, tile: AttentionTile) -> Tensor:
        """As the backend does it: decode rows by parts where no chunk stands beside them."""
        there = self._there
        out = torch.empty(self._query.shape, device=self._device)
        context = torch.tensor(self._contexts, dtype=torch.int32).to(self._device)
        is_decode = all(num == 1 for num in self._rows)
        chosen = torch.arange(len(self._rows), dtype=torch.int32, device=self._device)
        work = AttentionWork(
            cut_tiles(there["_row_begin"], chosen, len(self._query), tokens_a_tile(tile, self._shape)),
            chosen,
            there["_row_begin"],
            context,
            there["_block_begin"],
            there["_blocks"],
            -(-max(self._contexts) // PART) if is_decode else 0,
        )
        args = (there["_query"], there["_keys"], there["_values"], work, there["_positions"], self._shape, tile, out)
        paged_attention(*args)
        return out

    @cached_property
    def expected(self) -> Tensor:
        """By the reference."""
        counts = self._block_begin.diff().tolist()
        return reference.paged_attention(
            self._query.float(),
            self._keys,
            self._values,
            self._row_begin.tolist(),
            self._contexts,
            list(self._blocks.split(counts)),
            self._shape.head_dim**-0.5,
        )


def _cumulative(counts: list[int]) -> Tensor:
    return torch.tensor([0, *counts]).cumsum(0).int()
