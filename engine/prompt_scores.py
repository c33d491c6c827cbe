"""Log-probabilities of prompt tokens, from the rows that a step computes of prompts anyway."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from engine.scheduler import SchedulerOutput

_NUM_ROWS = 64  # whose logits are in memory at once: a row of a large vocabulary is half a megabyte


@torch.inference_mode()
def score_prompts(output: SchedulerOutput, residual: Tensor, logits: Callable[[Tensor], Tensor]) -> None:
    """Add to `new_scores` of each request that wants them what this step's rows say of its next prompt tokens.

    residual: [T, H] of the step's tokens; `logits` takes some of its rows to [n, V].
    """
    first_row = 0
    for request, num_tokens in output.num_tokens.items():
        start = request.num_computed_tokens
        if request.wants_scores:
            end = min(start + num_tokens, request.num_prompt_tokens - 1)
            for begin in range(max(start, request.num_scored), end, _NUM_ROWS):
                stop = min(begin + _NUM_ROWS, end)
                rows = residual[first_row + begin - start : first_row + stop - start]
                targets = request.token_ids[begin + 1 : stop + 1]
                request.new_scores += _scores(logits(rows), targets, request.params.prompt_logprobs or 0)
                request.num_scored = stop
        first_row += num_tokens


def _scores(logits: Tensor, targets: list[int], num_top: int) -> list[list[tuple[int, float]]]:
    """Logits [n, V] -> for each row (id, natural-log probability) of its target, then of the likeliest ones."""
    logprobs = logits.log_softmax(-1)
    chosen = logprobs.gather(1, torch.tensor(targets).to(logits.device)[:, None])[:, 0].tolist()
    top = logprobs.topk(num_top)
    return [
        [(target, logprob), *zip(ids, values, strict=True)]
        for target, logprob, ids, values in zip(targets, chosen, top.indices.tolist(), top.values.tolist(), strict=True)
    ]
