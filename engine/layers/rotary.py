"""Rotary position embedding: cosine and sine of each position."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from engine.models.spec import RopeSpec


def rotary_tables(spec: RopeSpec, head_dim: int, max_positions: int) -> tuple[Tensor, Tensor]:
    """cos, sin float32 [max_positions, head_dim], each frequency in both halves of the head."""
    angles = torch.arange(max_positions, dtype=torch.float32)[:, None] * _inverse_frequencies(spec, head_dim)
    angles = torch.cat((angles, angles), dim=-1)
    return angles.cos(), angles.sin()


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
