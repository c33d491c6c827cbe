"""Experts kept as plain numbers: `float32` for parity checks, `bf16` as most checkpoints come."""

from __future__ import annotations

import torch
from torch import Tensor

from kernels.quant.layout import RecordLayout, build_layout
from kernels.quant.record import ExpertWeights, section


class PlainFormat:
    """gate_up [2 I, H] and down [H, I] in one dtype; not quantised."""

    def __init__(self, name: str, dtype: torch.dtype) -> None:
        self.name = name
        self._dtype_name = str(dtype).removeprefix("torch.")

    def layout(self, hidden_size: int, intermediate_size: int) -> RecordLayout:
        arrays = [
            ("gate_up", self._dtype_name, (2 * intermediate_size, hidden_size)),
            ("down", self._dtype_name, (hidden_size, intermediate_size)),
        ]
        return build_layout(self.name, hidden_size, intermediate_size, arrays)

    def pack(self, weights: ExpertWeights, record: Tensor) -> None:
        intermediate_size, hidden_size = weights.gate.shape
        layout = self.layout(hidden_size, intermediate_size)
        gate_up = section(record, layout, "gate_up")
        gate_up[:intermediate_size] = weights.gate
        gate_up[intermediate_size:] = weights.up
        section(record, layout, "down").copy_(weights.down)

    def unpack(self, record: Tensor, layout: RecordLayout, dtype: torch.dtype) -> ExpertWeights:
        gate_up = section(record, layout, "gate_up").to(dtype)
        gate, up = gate_up.split(layout.intermediate_size)
        return ExpertWeights(gate, up, section(record, layout, "down").to(dtype))
