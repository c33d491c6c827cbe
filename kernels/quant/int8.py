"""`int8`: symmetric 8-bit weights in groups of 32; 8.5 bits a weight."""

from __future__ import annotations

import torch
from torch import Tensor

from kernels.quant.grouped import FLOAT16_MAX, GROUP_SIZE, GroupedFormat


class Int8Format(GroupedFormat):
    """weight ~= q * scale with q in -127..127."""

    name = "int8"
    dtype = "int8"
    values_per_item = 1

    def quantise(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        groups = weight.float().unflatten(-1, (-1, GROUP_SIZE))  # [N, K/32, 32]
        scales = (groups.abs().amax(-1) / 127.0).clamp_(max=FLOAT16_MAX).to(torch.float16)
        steps = scales.float().unsqueeze(-1)
        q = torch.where(steps > 0, groups / steps, 0.0).round_().clamp_(-127, 127)
        return q.to(torch.int8).flatten(-2), scales

    def dequantise(self, q: Tensor, scales: Tensor) -> Tensor:
        groups: Tensor = q.float().unflatten(-1, (-1, GROUP_SIZE))
        return (groups * scales.float().unsqueeze(-1)).flatten(-2)
