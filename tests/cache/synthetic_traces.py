"""Traces to test policies on: random ones, and ones whose tokens use what their request used before."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from cache.trace import RoutingTrace

REAL_TRACES = Path(__file__).parents[3] / "shared" / "traces"


def trace_of(ids: np.ndarray, lengths: list[int], num_experts: int, num_prompt: int = 0) -> RoutingTrace:
    return RoutingTrace(
        ids=ids.astype(np.uint8),
        seq_off=np.concatenate(([0], np.cumsum(lengths))).astype(np.int64),
        num_prompt=np.full(len(lengths), num_prompt, dtype=np.int64),
        num_experts=num_experts,
        layers=tuple(range(1, ids.shape[1] + 1)),
        domains=("synthetic",) * len(lengths),
    )


def random_trace(
    seed: int, lengths: list[int], *, num_layers: int = 3, num_experts: int = 6, active: int = 2, num_prompt: int = 0
) -> RoutingTrace:
    rng = np.random.default_rng(seed)
    ids = rng.random((sum(lengths), num_layers, num_experts)).argsort(axis=2)[:, :, :active]
    return trace_of(ids, lengths, num_experts, num_prompt)


def local_trace(
    seed: int,
    lengths: list[int],
    *,
    num_layers: int = 6,
    num_experts: int = 16,
    active: int = 2,
    strength: float = 1.0,
    num_prompt: int = 0,
) -> RoutingTrace:
    """All requests prefer some experts, each others of its own, and each token those of the token before."""
    rng = np.random.default_rng(seed)
    common = strength * rng.standard_normal((num_layers, num_experts))
    rows = []
    for length in lengths:
        taste = common + strength * rng.standard_normal((num_layers, num_experts))
        before = np.zeros((num_layers, num_experts))
        for _ in range(length):
            scores = taste + strength * before + rng.gumbel(size=taste.shape)
            chosen = (-scores).argsort(axis=1)[:, :active]
            before = np.zeros_like(before)
            np.put_along_axis(before, chosen, 1.0, axis=1)
            rows.append(chosen)
    return trace_of(np.stack(rows), lengths, num_experts, num_prompt)
