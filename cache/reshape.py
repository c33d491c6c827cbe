"""Recorded routing in the shape of another model: real locality where no trace of that model is to be had. No torch."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from cache.trace import RoutingTrace

_Ids = NDArray[np.int64]


def reshape(trace: RoutingTrace, num_layers: int, num_experts: int, num_active: int) -> RoutingTrace:
    """A stand-in, not that model's routing: what it keeps is how requests repeat themselves from token to token.

    Fewer experts: neighbours are put together, a token's best distinct ones kept. More: each further lot of experts is
    routed as another layer of the trace is. More layers: those of the trace again, half a request later. Raises
    `ValueError` where one number of experts does not divide the other.
    """
    few, many = sorted((trace.num_experts, num_experts))
    if many % few:
        raise ValueError(f"{trace.num_experts} experts cannot be folded or spread to {num_experts}")
    if not 0 < num_active <= num_experts:
        raise ValueError(f"{num_active} of {num_experts} experts cannot be active")
    ids = trace.ids.astype(np.int64)
    real = ids.shape[1]
    later = _half_a_request_later(trace)
    layers = []
    for layer in range(num_layers):
        rows = ids if layer // real % 2 == 0 else ids[later]
        if num_experts <= trace.num_experts:
            routed = _folded(rows[:, layer % real], trace.num_experts // num_experts, num_experts, num_active)
        else:
            num_lots = num_experts // trace.num_experts
            step = max(1, real // num_lots)
            lots = [rows[:, (layer + lot * step) % real] for lot in range(num_lots)]
            routed = _spread(lots, trace.num_experts, num_active)
        layers.append(routed)
    dtype = np.uint8 if num_experts <= 256 else np.uint16
    return replace(
        trace,
        ids=np.stack(layers, axis=1).astype(dtype),
        num_experts=num_experts,
        layers=tuple(range(num_layers)),
    )


def _folded(ids: _Ids, group: int, num_experts: int, num_active: int) -> _Ids:
    """ids [T, k] -> the first `num_active` distinct groups of each token; where there are fewer, those that follow."""
    wanted = ids // group
    more = (wanted[:, :1] + np.arange(num_experts)) % num_experts  # all of them, beginning with the best
    return _first_distinct(np.concatenate([wanted, more], axis=1), num_active)


def _spread(lots: list[_Ids], lot_size: int, num_active: int) -> _Ids:
    """The best of each lot in turn, lot i's experts being i * lot_size and on; where k is short, those that follow."""
    shifted = [ids + i * lot_size for i, ids in enumerate(lots)]
    in_turn = np.stack(shifted, axis=2).reshape(len(lots[0]), -1)
    num_experts = lot_size * len(lots)
    more = (in_turn[:, :1] + np.arange(num_experts)) % num_experts
    return _first_distinct(np.concatenate([in_turn, more], axis=1), num_active)


def _first_distinct(ids: _Ids, num: int) -> _Ids:
    """Of each row the first `num` distinct values, in order."""
    order = np.argsort(ids, axis=1, kind="stable")
    ascending = np.take_along_axis(ids, order, axis=1)
    is_repeated = np.zeros(ids.shape, dtype=np.bool_)
    np.put_along_axis(is_repeated, order, np.diff(ascending, axis=1, prepend=ascending[:, :1] - 1) == 0, axis=1)
    places = np.argsort(is_repeated, axis=1, kind="stable")[:, :num]
    return np.take_along_axis(ids, places, axis=1)


def _half_a_request_later(trace: RoutingTrace) -> _Ids:
    """For each row another of its request, half of it on, and round."""
    rows = np.arange(trace.num_tokens)
    begin = np.repeat(trace.seq_off[:-1], np.diff(trace.seq_off)).astype(np.int64)
    length = np.repeat(np.diff(trace.seq_off), np.diff(trace.seq_off)).astype(np.int64)
    return begin + (rows - begin + length // 2) % np.maximum(length, 1)
