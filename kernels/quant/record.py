"""What a quantisation format must offer, and the helpers that formats share to read and write their records."""

from __future__ import annotations

from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from kernels.quant.layout import RecordLayout


class ExpertWeights(NamedTuple):
    """One SwiGLU expert: gate and up [I, H], down [H, I]."""

    gate: Tensor
    up: Tensor
    down: Tensor


class QuantFormat(Protocol):
    """One way to keep an expert at rest."""

    name: str

    def layout(self, hidden_size: int, intermediate_size: int) -> RecordLayout:
        """The record's sections; raises `ValueError` with the cure if the format cannot hold this shape."""
        ...

    def pack(self, weights: ExpertWeights, record: Tensor) -> None:
        """Quantise float weights into `record`, uint8 [layout.nbytes], zeroed before."""
        ...

    def unpack(self, record: Tensor, layout: RecordLayout, dtype: torch.dtype) -> ExpertWeights:
        """The weights that a record stands for, dequantised to `dtype`; may be views of the record."""
        ...


def section(record: Tensor, layout: RecordLayout, name: str) -> Tensor:
    """The named section of a record as a typed view."""
    part = layout[name]
    raw = record[part.offset : part.offset + part.nbytes]
    dtype: torch.dtype = getattr(torch, part.dtype)
    return raw.view(dtype).view(part.shape)
