"""One step as tensors: the new tokens of all scheduled requests, one after the other, without padding."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from cache.expert_cache import Phase
from engine.scheduler import SchedulerOutput


@dataclass(slots=True)
class Batch:
    """T tokens of S sequences."""

    token_ids: Tensor  # [T] int64
    positions: Tensor  # [T] int64
    new_slots: Tensor  # [T] int64, where their KV goes
    spans: list[tuple[int, int]]  # S times (first row, end row)
    context_slots: list[Tensor]  # S times [context] int64, slots of all tokens up to the last new one
    logit_rows: Tensor  # [sampled] int64, rows whose next token is wanted
    phase: Phase

    @classmethod
    def build(
        cls, output: SchedulerOutput, block_size: int, device: torch.device, *, all_logits: bool = False
    ) -> Batch:
        """From what was scheduled. Logits are wanted of the last token of each sequence that has caught up."""
        token_ids: list[int] = []
        positions: list[int] = []
        spans: list[tuple[int, int]] = []
        context_slots: list[Tensor] = []
        new_slots: list[Tensor] = []
        logit_rows: list[int] = []
        offsets = torch.arange(block_size)
        for request, num_tokens in output.num_tokens.items():
            start, end = request.num_computed_tokens, request.num_computed_tokens + num_tokens
            first_row = len(token_ids)
            token_ids += request.token_ids[start:end]
            positions += range(start, end)
            spans.append((first_row, len(token_ids)))
            slots = (torch.tensor(request.block_ids)[:, None] * block_size + offsets).flatten()[:end]
            context_slots.append(slots.to(device))
            new_slots.append(slots[start:])
            if end == request.num_tokens:
                logit_rows.append(len(token_ids) - 1)
        return cls(
            token_ids=torch.tensor(token_ids, device=device),
            positions=torch.tensor(positions, device=device),
            new_slots=torch.cat(new_slots).to(device),
            spans=spans,
            context_slots=context_slots,
            logit_rows=torch.arange(len(token_ids)) if all_logits else torch.tensor(logit_rows, dtype=torch.int64),
            phase="decode" if len(token_ids) == len(spans) else "prefill",
        )
