"""The one door to expert compute: all ready experts of a layer, over all tokens that are routed to them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from kernels import reference
from kernels.quant.layout import RecordLayout
from kernels.quant.record import QuantFormat


def group_by_expert(topk_ids: Tensor) -> dict[int, Tensor]:
    """topk_ids [T, k] -> expert id -> flat positions (token * k + rank) [n] that are routed to it, ascending."""
    flat = topk_ids.flatten()
    order = flat.argsort(stable=True)
    ids, counts = torch.unique_consecutive(flat[order], return_counts=True)
    return dict(zip(ids.tolist(), order.split(counts.tolist()), strict=True))


def expert_mlp(
    x: Tensor,
    positions: dict[int, Tensor],
    experts: Sequence[tuple[int, Tensor]],
    quant_format: QuantFormat,
    layout: RecordLayout,
    out: Tensor,
) -> None:
    """Compute the given experts for the tokens routed to them.

    x [T, H]; positions from `group_by_expert`; experts are (id, record uint8 [layout.nbytes]), computed from where they
    lie; each (token, rank) product is written to its own row of out [T, k, H], for `reference.combine`.
    """
    if out.shape[0] != x.shape[0] or out.shape[2] != x.shape[1] or not out.is_contiguous():
        raise ValueError(f"out {tuple(out.shape)} does not fit x {tuple(x.shape)}, or is not contiguous")
    num_active = out.shape[1]
    rows_out = out.view(-1, out.shape[2])
    for expert_id, record in experts:
        at = positions[expert_id]
        weights = quant_format.unpack(record, layout, x.dtype)
        rows_out[at] = reference.swiglu(x[at // num_active], weights.gate, weights.up, weights.down)
