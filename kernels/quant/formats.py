"""Expert formats: how an expert becomes a record and back. All are blocked the same way and differ in the numbers."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from kernels.quant.blocked import PIECE_NBYTES, pack_matrix, packed_nbytes, unpack_matrix
from kernels.quant.layout import RecordLayout, build_layout

SIZE_MULTIPLE = 32  # of hidden and intermediate size: a group of weights, two blocks of outputs


class ExpertWeights(NamedTuple):
    """One SwiGLU expert: gate and up [I, H], down [H, I]."""

    gate: Tensor
    up: Tensor
    down: Tensor


class ExpertFormat:
    """One way to keep an expert at rest: gate and up interleaved by blocks of 16 units, then down."""

    def __init__(self, name: str) -> None:
        self.name = name

    def layout(self, hidden_size: int, intermediate_size: int) -> RecordLayout:
        """The record's sections; raises `ValueError` with the cure if the kernels cannot compute this shape."""
        for name, size in (("hidden size", hidden_size), ("expert intermediate size", intermediate_size)):
            if size % SIZE_MULTIPLE:
                raise ValueError(
                    f"experts need a {name} that is a multiple of {SIZE_MULTIPLE}, this model's is {size}; "
                    "it cannot be served"
                )
        arrays = [
            ("gate_up", "uint8", (packed_nbytes(self.name, 2 * intermediate_size, hidden_size),)),
            ("down", "uint8", (packed_nbytes(self.name, hidden_size, intermediate_size),)),
        ]
        return build_layout(self.name, hidden_size, intermediate_size, arrays)

    def pack(self, weights: ExpertWeights, record: Tensor) -> None:
        """Quantise float weights into `record`, uint8 [layout.nbytes], zeroed before."""
        intermediate_size, hidden_size = weights.gate.shape
        layout = self.layout(hidden_size, intermediate_size)
        gate, up = pack_matrix(self.name, weights.gate), pack_matrix(self.name, weights.up)
        _section(record, layout, "gate_up").copy_(torch.stack((gate, up), dim=1).flatten())
        _section(record, layout, "down").copy_(pack_matrix(self.name, weights.down).flatten())

    def unpack(self, record: Tensor, layout: RecordLayout) -> ExpertWeights:
        """The float32 weights that a record stands for."""
        hidden_size, intermediate_size = layout.hidden_size, layout.intermediate_size
        both = _section(record, layout, "gate_up").view(intermediate_size // 16, 2, -1)
        gate, up = (unpack_matrix(self.name, both[:, i].contiguous(), intermediate_size, hidden_size) for i in (0, 1))
        down = unpack_matrix(self.name, _section(record, layout, "down"), hidden_size, intermediate_size)
        return ExpertWeights(gate, up, down)


def _section(record: Tensor, layout: RecordLayout, name: str) -> Tensor:
    part = layout[name]
    return record[part.offset : part.offset + part.nbytes]


FORMATS: dict[str, ExpertFormat] = {name: ExpertFormat(name) for name in PIECE_NBYTES}


def get_format(name: str) -> ExpertFormat:
    """The format of that name; raises `ValueError` that lists the known ones."""
    if name not in FORMATS:
        raise ValueError(f"unknown expert format {name!r}; known: {', '.join(FORMATS)}")
    return FORMATS[name]
