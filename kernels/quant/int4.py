"""`int4`: symmetric 4-bit weights in groups of 32; 4.5 bits a weight."""

from __future__ import annotations

import torch
from torch import Tensor

from kernels.quant.grouped import FLOAT16_MAX, GROUP_SIZE, GroupedFormat


class Int4Format(GroupedFormat):
    """weight ~= (nibble - 8) * scale.

    The scale is signed so that the group's largest magnitude falls on -8, the longer end of the range (as in GGUF's
    Q4_0). Byte j of a group holds element j in its low and element j + 16 in its high nibble.
    """

    name = "int4"
    dtype = "uint8"
    values_per_item = 2

    def quantise(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        groups = weight.float().unflatten(-1, (-1, GROUP_SIZE))  # [N, K/32, 32]
        extreme = groups.gather(-1, groups.abs().argmax(-1, keepdim=True)).squeeze(-1)
        scales = (extreme / -8.0).clamp_(-FLOAT16_MAX, FLOAT16_MAX).to(torch.float16)
        steps = scales.float().unsqueeze(-1)
        q = torch.where(steps != 0, groups / steps, 0.0).round_().clamp_(-8, 7).add_(8).to(torch.uint8)
        low, high = q.split(GROUP_SIZE // 2, dim=-1)
        return (low | (high << 4)).flatten(-2), scales

    def dequantise(self, q: Tensor, scales: Tensor) -> Tensor:
        groups = q.unflatten(-1, (-1, GROUP_SIZE // 2))  # [N, K/32, 16]
        values = torch.cat((groups & 15, groups >> 4), dim=-1).float() - 8.0
        return (values * scales.float().unsqueeze(-1)).flatten(-2)
