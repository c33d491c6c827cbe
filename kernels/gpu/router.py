"""The choice of experts."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.gpu.launch import checked, launch, rows_a_program

ROUTINGS = ("softmax", "softmax_renormalised", "unweighted")


@triton.jit
def _route_kernel(
    logits,
    ids,
    weights,
    num_tokens,
    num_experts,
    num_active,
    IS_WEIGHTED: tl.constexpr,
    IS_RENORMALISED: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    ACTIVE: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    expert = tl.arange(0, BLOCK)[None, :]
    is_expert = expert < num_experts
    at = token[:, None] * num_experts + expert
    is_token = (token < num_tokens)[:, None]
    scores = tl.load(logits + at, mask=is_token & is_expert, other=0.0)
    scores = tl.where(is_expert, scores, float("-inf"))
    if IS_WEIGHTED:
        scores = tl.exp(scores - tl.max(scores, 1)[:, None])
        scores = scores / tl.sum(scores, 1)[:, None]
        scores = tl.where(is_expert, scores, float("-inf"))
    rank = tl.arange(0, ACTIVE)[None, :]
    chosen = tl.zeros([ROWS, ACTIVE], tl.int32)
    chosen_scores = tl.zeros([ROWS, ACTIVE], tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    for i in range(num_active):
        top = tl.max(scores, 1)
        best = tl.min(tl.where(scores == top[:, None], expert, BLOCK), 1)  # ties go to the lower expert
        chosen = tl.where(rank == i, best[:, None], chosen)
        chosen_scores = tl.where(rank == i, top[:, None], chosen_scores)
        total += top
        scores = tl.where(expert == best[:, None], float("-inf"), scores)
    if not IS_WEIGHTED:
        chosen_scores = tl.full([ROWS, ACTIVE], 1.0, tl.float32)
    elif IS_RENORMALISED:
        chosen_scores = chosen_scores / total[:, None]
    to = token[:, None] * num_active + rank
    wanted = is_token & (rank < num_active)
    tl.store(ids + to, chosen, mask=wanted)
    tl.store(weights + to, chosen_scores, mask=wanted)


def route(logits: Tensor, num_active: int, routing: str) -> tuple[Tensor, Tensor]:
    """Router logits float32 [T, E] -> (ids int32 [T, k], weights float32 [T, k]), best first; `reference.route`.

    Of equal experts the lower wins.
    """
    checked(logits, torch.float32, -1, -1)
    num_tokens, num_experts = logits.shape
    if routing not in ROUTINGS:
        raise ValueError(f"unknown routing {routing!r}; known: {', '.join(ROUTINGS)}")
    if not 0 < num_active <= num_experts:
        raise ValueError(f"top-{num_active} does not fit a router of {num_experts}")
    ids = torch.empty(num_tokens, num_active, dtype=torch.int32, device=logits.device)
    weights = torch.empty(num_tokens, num_active, device=logits.device)
    rows = rows_a_program(1)
    launch(
        _route_kernel,
        (-(-num_tokens // rows),),
        logits,
        ids,
        weights,
        num_tokens,
        num_experts,
        num_active,
        options={"num_warps": 1, "num_stages": 1},
        IS_WEIGHTED=routing != "unweighted",
        IS_RENORMALISED=routing == "softmax_renormalised",
        ROWS=rows,
        BLOCK=triton.next_power_of_2(num_experts),
        ACTIVE=triton.next_power_of_2(num_active),
    )
    return ids, weights
