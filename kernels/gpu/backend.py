"""The Triton kernels behind `kernels.backend.Backend`: all tensors on one GPU, or, interpreted, on the CPU."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise

import torch
from torch import Tensor

from kernels.backend import (
    AttentionKernel,
    AttentionShape,
    Linear,
    MlpKernel,
    Records,
    RouterKernel,
    Routing,
    Sequences,
)
from kernels.gpu import experts, linear, norm
from kernels.gpu.attention import PART, AttentionTile, AttentionWork, paged_attention, tokens_a_tile
from kernels.gpu.configs import Configs, load_configs
from kernels.gpu.grouping import cut_tiles, group_by_expert
from kernels.gpu.kv import append_kv
from kernels.gpu.launch import INTERPRETED, is_available
from kernels.gpu.matrix import PackedMatrix
from kernels.gpu.rounding import round_rows
from kernels.gpu.router import route as _route


class TritonLinear:
    """A packed matrix on the GPU; see `kernels.backend.Linear`."""

    def __init__(
        self, configs: Configs, device: torch.device, weight: Tensor, bias: Tensor | None, format: str
    ) -> None:
        self.matrix = PackedMatrix.pack(weight, format, device)
        self._bias = None if bias is None else bias.float().contiguous().to(device)
        self._configs = configs

    @property
    def num_outputs(self) -> int:
        return self.matrix.shape.num_outputs

    @property
    def num_inputs(self) -> int:
        return self.matrix.shape.num_inputs

    def __call__(self, x: Tensor, add_to: Tensor | None = None, *, is_gated: bool = False) -> Tensor:
        """`is_gated`: x is [n, 2 K], of which silu(first half) * second half is multiplied."""
        if x.dtype != torch.float32 or not x.is_contiguous():
            raise ValueError(f"expected contiguous torch.float32, got {x.dtype} with strides {x.stride()}")
        if x.dim() != 2 or x.shape[1] != self.num_inputs * (2 if is_gated else 1):
            raise ValueError(f"x {tuple(x.shape)} does not fit a matrix of [{self.num_outputs}, {self.num_inputs}]")
        format = self.matrix.shape.format
        rows = round_rows(x, format, is_dense=True, is_gated=is_gated)
        return linear.linear(rows, self.matrix, self._bias, self._configs.tile("linear", format, x.shape[0]), add_to)


class _Step:
    """What all layers of a step share: its sequences cut into tiles, those with one new row apart from chunks."""

    def __init__(self, sequences: Sequences, tokens: int) -> None:
        self.sequences, self.tokens = sequences, tokens
        begin, context = sequences.row_begin.tolist(), sequences.context.tolist()
        numbers = [end - start for start, end in pairwise(begin)]
        self.works: list[AttentionWork] = []
        for is_decode in (True, False):
            chosen = [s for s, number in enumerate(numbers) if (number == 1) == is_decode and number]
            if not chosen:
                continue
            num_rows = sum(numbers[s] for s in chosen)
            at = torch.tensor(chosen, dtype=torch.int32).to(sequences.row_begin.device)
            self.works.append(
                AttentionWork(
                    cut_tiles(sequences.row_begin, at, num_rows, tokens),
                    at,
                    sequences.row_begin,
                    sequences.context,
                    sequences.block_begin,
                    sequences.blocks,
                    # a part's programs write beside all rows', so they are for steps that have no chunk
                    -(-max(context) // PART) if is_decode and len(chosen) == len(numbers) else 0,
                )
            )


class TritonAttention:
    """One layer's attention; see `kernels.backend.AttentionKernel`."""

    def __init__(
        self, backend: TritonBackend, shape: AttentionShape, weight: Tensor, qkv: TritonLinear, output: TritonLinear
    ) -> None:
        head_dim = shape.head_dim
        if qkv.num_outputs != (shape.num_heads + 2 * shape.num_kv_heads) * head_dim or weight.shape != (
            qkv.num_inputs,
        ):
            raise ValueError(f"norm {tuple(weight.shape)} or a qkv of {qkv.num_outputs} rows does not fit {shape}")
        if output.num_inputs != shape.num_heads * head_dim or output.num_outputs != qkv.num_inputs:
            raise ValueError(f"output [{output.num_outputs}, {output.num_inputs}] does not fit {shape}")
        self._backend, self._qkv, self._output = backend, qkv, output
        self._norm = weight
        self._shape = replace(
            shape,
            q_norm=None if shape.q_norm is None else backend.to_device(shape.q_norm),
            k_norm=None if shape.k_norm is None else backend.to_device(shape.k_norm),
            cos=backend.table(shape.cos),
            sin=backend.table(shape.sin),
        )

    def __call__(self, residual: Tensor, keys: Tensor, values: Tensor, sequences: Sequences) -> None:
        shape, backend = self._shape, self._backend
        if residual.shape != (len(sequences.positions), self._qkv.num_inputs):
            raise ValueError(f"residual {tuple(residual.shape)} does not fit the sequences or the layer")
        x = norm.rms_norm(residual, self._norm, shape.eps)
        query = append_kv(self._qkv(x), shape, sequences.positions, sequences.slots, keys, values)
        attended = torch.empty(query.shape, device=residual.device)
        tile = backend.attention_tiles[keys.dtype]
        for work in backend.step(sequences, tokens_a_tile(tile, shape)).works:
            paged_attention(query, keys, values, work, sequences.positions, shape, tile, attended)
        self._output(attended.flatten(1), add_to=residual)


class TritonBackend:
    """See `kernels.backend.Backend`. One per GPU; results do not depend on how many rows a call has."""

    name = "triton"

    def __init__(self, device: torch.device | None = None, configs: Configs | None = None) -> None:
        """`device`: a GPU, by default the current one. Raises `RuntimeError` where neither GPU nor interpreter is."""
        if not is_available():
            raise RuntimeError(
                "the Triton kernels need a GPU that torch can use, and there is none; --kernels native runs on the CPU"
            )
        self.device = device or torch.device("cpu" if INTERPRETED else "cuda")
        self.configs = configs or load_configs(*device_names(self.device))
        self.attention_tiles = {
            torch.bfloat16: AttentionTile(**self.configs.attention["bf16"]),
            torch.float32: AttentionTile(**self.configs.attention["float32"]),
        }
        self._step: _Step | None = None
        self._tables: dict[int, tuple[Tensor, Tensor]] = {}

    def to_device(self, x: Tensor) -> Tensor:
        """As float32, there."""
        return x.float().contiguous().to(self.device)

    def table(self, x: Tensor) -> Tensor:
        """`x` as float32 there, the same for every layer that gives the same tensor."""
        if id(x) not in self._tables:
            self._tables[id(x)] = x, self.to_device(x)
        return self._tables[id(x)][1]

    def step(self, sequences: Sequences, tokens: int) -> _Step:
        """The tiles of a step, made once for all its layers."""
        if self._step is None or self._step.sequences is not sequences or self._step.tokens != tokens:
            self._step = _Step(sequences, tokens)
        return self._step

    def make_linear(self, weight: Tensor, bias: Tensor | None, format: str) -> Linear:
        return TritonLinear(self.configs, self.device, weight, bias, format)

    def make_attention(self, shape: AttentionShape, norm: Tensor, qkv: Linear, output: Linear) -> AttentionKernel:
        return TritonAttention(self, shape, self.to_device(norm), _ours(qkv), _ours(output))

    def make_router(self, norm: Tensor, eps: float, router: Linear, num_active: int, routing: str) -> RouterKernel:
        matrix = _ours(router)
        if norm.shape != (matrix.num_inputs,) or not 0 < num_active <= matrix.num_outputs:
            raise ValueError(
                f"norm {tuple(norm.shape)} or top-{num_active} does not fit a router of {matrix.num_outputs}"
            )
        weight = self.to_device(norm)

        def route(residual: Tensor) -> tuple[Tensor, Routing]:
            if residual.shape[1] != matrix.num_inputs:
                raise ValueError(
                    f"residual {tuple(residual.shape)} does not fit a router of {matrix.num_inputs} inputs"
                )
            x = self.rms_norm(residual, weight, eps)
            return x, group(*_route(matrix(x), num_active, routing), matrix.num_outputs)

        return route

    def make_mlp(self, norm: Tensor | None, eps: float, gate_up: Linear, down: Linear) -> MlpKernel:
        inward, outward = _ours(gate_up), _ours(down)
        if inward.num_outputs != 2 * outward.num_inputs or inward.num_inputs != outward.num_outputs:
            raise ValueError(f"gate and up of {inward.num_outputs} rows do not fit down of {outward.num_inputs} inputs")
        weight = None if norm is None else self.to_device(norm)

        def mlp(x: Tensor, residual: Tensor) -> None:
            if x.shape != residual.shape:
                raise ValueError(f"x {tuple(x.shape)} does not fit residual {tuple(residual.shape)}")
            normed = x if weight is None else self.rms_norm(x, weight, eps)
            outward(inward(normed), add_to=residual, is_gated=True)

        return mlp

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        return norm.rms_norm(x, weight, eps)

    def expert_mlp(
        self,
        x: Tensor,
        routing: Routing,
        records: Records,
        ready: Sequence[tuple[int, int]],
        outputs: Tensor,
        add_to: Tensor | None = None,
    ) -> None:
        layout = records.layout
        num_tokens, num_active = routing.ids.shape
        if (
            x.shape != (num_tokens, layout.hidden_size)
            or outputs.shape != (num_tokens * num_active, layout.hidden_size)
            or (add_to is not None and add_to.shape != x.shape)
        ):
            raise ValueError(f"x {tuple(x.shape)} or outputs {tuple(outputs.shape)} does not fit the routing")
        index = {expert: i for i, expert in enumerate(routing.experts)}
        if any(expert not in index for expert, _ in ready):
            raise ValueError(f"some of the experts {ready} were not routed to")
        arena = records.slots[0]
        base = records.addresses[0]
        table = torch.tensor([[index[expert], (records.addresses[slot] - base) // 64] for expert, slot in ready])
        table = table.view(-1, 2).to(x.device)  # one copy for both columns
        chosen, offsets = table[:, 0].int(), table[:, 1].contiguous()
        rows_each = routing.num_positions / max(1, len(routing.experts))
        tiles = {
            kernel: self.configs.tile(kernel, layout.format, rows_each) for kernel in ("expert_gate_up", "expert_down")
        }
        works: dict[int, experts.ExpertTiles] = {}
        for rows in {tile.rows for tile in tiles.values()}:
            cut = cut_tiles(routing.row_begin, chosen, routing.num_positions, rows)
            works[rows] = experts.ExpertTiles(cut, offsets, routing.positions)
        tile = tiles["expert_gate_up"]
        rounded = round_rows(x, layout.format)
        inner = experts.expert_gate_up(rounded, works[tile.rows], arena, layout, num_active, tile)
        tile = tiles["expert_down"]
        rounded = round_rows(inner, layout.format)
        experts.expert_down(rounded, works[tile.rows], arena, layout, tile, outputs)
        if add_to is not None:
            self.combine(outputs, routing.weights, add_to)

    def combine(self, outputs: Tensor, weights: Tensor, add_to: Tensor) -> None:
        experts.combine(outputs, weights, add_to)


def group(ids: Tensor, weights: Tensor, num_experts: int) -> Routing:
    """A routing on the GPU; which experts it has is read back, since the cache must know."""
    begin, positions = group_by_expert(ids, num_experts)
    found = (begin[1:] > begin[:-1]).nonzero().flatten()
    row_begin = torch.cat((begin[found], begin[-1:]))
    return Routing(ids, weights, found.tolist(), row_begin, positions, ids.numel())


def device_names(device: torch.device) -> tuple[str, str]:
    """The GPU's name and architecture as `load_configs` takes them."""
    if device.type == "cpu":
        return "", "interpreter"
    properties = torch.cuda.get_device_properties(device)
    if torch.version.hip is not None:
        return properties.name, str(properties.gcnArchName).split(":")[0]
    return properties.name, f"sm_{properties.major}{properties.minor}"


def _ours(linear: Linear) -> TritonLinear:
    if not isinstance(linear, TritonLinear):
        raise TypeError("the matrix was made by another backend")
    return linear
