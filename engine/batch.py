"""One step as tensors: the new tokens of all scheduled requests, one after the other, without padding."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from cache.lease import Phase
from engine.kv_cache import BLOCK_SIZE
from engine.scheduler import SchedulerOutput
from kernels.backend import Routing, Sequences


@dataclass(slots=True)
class Batch:
    """T tokens of S sequences."""

    token_ids: Tensor  # [T] int64, in the CPU's memory
    sequences: Sequences
    logit_rows: Tensor | None  # int64 [sampled], rows whose next token is wanted; None: all of them
    phase: Phase
    requests: list[int]  # [T] whose token it is, by number
    routings: list[Routing] | None = None  # of each layer with experts, where a pre-gate has made them

    @classmethod
    def build(cls, output: SchedulerOutput, *, all_logits: bool = False, device: torch.device | str = "cpu") -> Batch:
        """From what was scheduled. Logits are wanted of the last token of each sequence that has caught up.

        `device`: what the model computes on. Token ids stay in the CPU's memory.
        """
        token_ids: list[int] = []
        positions: list[int] = []
        slots: list[int] = []
        row_begin, block_begin = [0], [0]
        context: list[int] = []
        blocks: list[int] = []
        logit_rows: list[int] = []
        requests: list[int] = []
        for request, num_tokens in output.num_tokens.items():
            requests += [request.number] * num_tokens
            start, end = request.num_computed_tokens, request.num_computed_tokens + num_tokens
            token_ids += request.token_ids[start:end]
            positions += range(start, end)
            slots += [request.block_ids[p // BLOCK_SIZE] * BLOCK_SIZE + p % BLOCK_SIZE for p in range(start, end)]
            blocks += request.block_ids[: -(-end // BLOCK_SIZE)]
            row_begin.append(len(token_ids))
            block_begin.append(len(blocks))
            context.append(end)
            if end == request.num_tokens:
                logit_rows.append(len(token_ids) - 1)
        columns = (positions, slots, row_begin, context, block_begin, blocks)
        sequences = Sequences(*(_int32(column).to(device) for column in columns))
        are_all = all_logits or len(logit_rows) == len(token_ids)
        return cls(
            token_ids=torch.tensor(token_ids),
            sequences=sequences,
            logit_rows=None if are_all else torch.tensor(logit_rows).long().to(device),
            phase="decode" if len(token_ids) == len(context) else "prefill",
            requests=requests,
        )


def _int32(values: list[int]) -> Tensor:
    return torch.tensor(values, dtype=torch.int32)
