"""Group-quantised formats: integers with one float16 scale for each group of 32 weights along the input."""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
from torch import Tensor

from kernels.quant.layout import RecordLayout, build_layout
from kernels.quant.record import ExpertWeights, section

GROUP_SIZE = 32
FLOAT16_MAX = 65504.0


class GroupedFormat(ABC):
    """gate_up [2 I, H] and down [H, I] as integers, each with float16 scales [rows, columns / 32]."""

    name: str
    dtype: str  # of the stored integers
    values_per_item: int

    @abstractmethod
    def quantise(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        """weight [N, K] -> integers [N, K / values_per_item], scales float16 [N, K / 32]."""

    @abstractmethod
    def dequantise(self, q: Tensor, scales: Tensor) -> Tensor:
        """The inverse of `quantise`, float32 [N, K]."""

    def layout(self, hidden_size: int, intermediate_size: int) -> RecordLayout:
        for name, size in (("hidden size", hidden_size), ("expert intermediate size", intermediate_size)):
            if size % GROUP_SIZE:
                raise ValueError(
                    f"experts of format {self.name} need a {name} that is a multiple of {GROUP_SIZE}, "
                    f"this model's is {size}; use --experts bf16"
                )
        arrays = []
        for name, rows, columns in (
            ("gate_up", 2 * intermediate_size, hidden_size),
            ("down", hidden_size, intermediate_size),
        ):
            arrays.append((name, self.dtype, (rows, columns // self.values_per_item)))
            arrays.append((f"{name}_scales", "float16", (rows, columns // GROUP_SIZE)))
        return build_layout(self.name, hidden_size, intermediate_size, arrays)

    def pack(self, weights: ExpertWeights, record: Tensor) -> None:
        intermediate_size, hidden_size = weights.gate.shape
        layout = self.layout(hidden_size, intermediate_size)
        for name, weight in (("gate_up", torch.cat((weights.gate, weights.up))), ("down", weights.down)):
            q, scales = self.quantise(weight)
            section(record, layout, name).copy_(q)
            section(record, layout, f"{name}_scales").copy_(scales)

    def unpack(self, record: Tensor, layout: RecordLayout, dtype: torch.dtype) -> ExpertWeights:
        gate_up, down = (
            self.dequantise(section(record, layout, name), section(record, layout, f"{name}_scales")).to(dtype)
            for name in ("gate_up", "down")
        )
        gate, up = gate_up.split(layout.intermediate_size)
        return ExpertWeights(gate, up, down)
