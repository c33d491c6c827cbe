"""Rotary position embedding: cosine and sine of each position."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from engine.models.spec import RopeSpec


class RotaryEmbedding:
    """Tables cos, sin [max_positions, head_dim] in float32, rows given out by position."""

    def __init__(self, spec: RopeSpec, head_dim: int, max_positions: int, device: torch.device) -> None:
        frequencies = _inverse_frequencies(spec, head_dim)
        angles = torch.arange(max_positions, dtype=torch.float32)[:, None] * frequencies  # [positions, D/2]
        angles = torch.cat((angles, angles), dim=-1)
        self._cos, self._sin = angles.cos().to(device), angles.sin().to(device)

    def __call__(self, positions: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """positions [T] -> cos, sin [T, head_dim]."""
        return self._cos[positions].to(dtype), self._sin[positions].to(dtype)


def _inverse_frequencies(spec: RopeSpec, head_dim: int) -> Tensor:
    inverse = 1.0 / spec.theta ** (torch.arange(0, head_dim, 2, dtype=torch.int64).float() / head_dim)
    if spec.type == "linear":
        return inverse / spec.factor
    if spec.type == "llama3":  # Llama 3.1: long wavelengths are stretched, short ones kept, smooth between
        context = spec.original_max_position_embeddings
        wavelength = 2 * math.pi / inverse
        smooth = (context / wavelength - spec.low_freq_factor) / (spec.high_freq_factor - spec.low_freq_factor)
        smooth = smooth.clamp(0.0, 1.0)
        return (1 - smooth) * inverse / spec.factor + smooth * inverse
    return inverse
