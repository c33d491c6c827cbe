"""The table of expert formats."""

from __future__ import annotations

import torch

from kernels.quant.int4 import Int4Format
from kernels.quant.int8 import Int8Format
from kernels.quant.plain import PlainFormat
from kernels.quant.record import QuantFormat

FORMATS: dict[str, QuantFormat] = {
    "float32": PlainFormat("float32", torch.float32),
    "bf16": PlainFormat("bf16", torch.bfloat16),
    "int8": Int8Format(),
    "int4": Int4Format(),
}


def get_format(name: str) -> QuantFormat:
    """The format of that name; raises `ValueError` that lists the known ones."""
    if name not in FORMATS:
        raise ValueError(f"unknown expert format {name!r}; known: {', '.join(FORMATS)}")
    return FORMATS[name]
