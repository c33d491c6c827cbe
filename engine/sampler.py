"""From logits to tokens, each request by its own parameters and its own random numbers."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from engine.request import Request
from kernels.backend import Choose, Draw


@dataclass(frozen=True, slots=True)
class SampledToken:
    """A chosen token; `logprobs` are (id, natural-log probability), the chosen one first, then the top ones."""

    token_id: int
    logprobs: list[tuple[int, float]] | None


class Sampler:
    """Every draw depends on the request's seed and position alone: batch, preemption and timing do not change it."""

    def __init__(self, eos_token_ids: Sequence[int], choose: Choose) -> None:
        self._eos_token_ids = list(eos_token_ids)
        self._choose = choose

    def sample(
        self, rows: Sequence[Tensor], requests: Sequence[Request], masks: Sequence[Tensor] | None = None
    ) -> list[SampledToken]:
        """float32 rows [V] of logits, one a request, not changed -> one token each.

        With masks, int32 [V / 32] each, tokens whose bit is not set never come, and a draw does not depend on the one
        that the request makes at the same place without. Raises `ValueError` if nothing is left to choose from.
        """
        if not rows:
            return []
        if masks is None:
            adjusted = [self._adjust(row, request) for row, request in zip(rows, requests, strict=True)]
            draws = [_draw(request, None) for request in requests]
        else:
            adjusted = [self._reweigh(row, request) for row, request in zip(rows, requests, strict=True)]
            allowed = [self._without_ends(mask, request) for mask, request in zip(masks, requests, strict=True)]
            draws = [_draw(request, mask) for mask, request in zip(allowed, requests, strict=True)]
        tokens = self._choose(adjusted, draws)
        return [
            SampledToken(token, None if (num := request.params.logprobs) is None else _logprobs(row, token, num))
            for row, token, request in zip(rows, tokens, requests, strict=True)
        ]

    def _adjust(self, row: Tensor, request: Request) -> Tensor:
        """Bias, penalties, forbidden ends; the row itself if there are none."""
        adjusted = self._reweigh(row, request)
        ends = [token_id for token_id in self._forbidden_ends(request) if token_id < len(row)]
        if ends:
            adjusted = adjusted.clone() if adjusted is row else adjusted
            adjusted[ends] = float("-inf")
        return adjusted

    def _without_ends(self, mask: Tensor, request: Request) -> Tensor:
        """A mask that forbids the ends too, unless the grammar allows nothing else."""
        ends = [token_id for token_id in self._forbidden_ends(request) if token_id < 32 * len(mask)]
        if not ends:
            return mask
        going_on = mask.clone()
        for token_id in ends:
            going_on[token_id // 32] &= ~_bit(token_id % 32)
        return going_on if bool(going_on.any()) else mask

    def _forbidden_ends(self, request: Request) -> Sequence[int]:
        params = request.params
        if request.num_output_tokens < params.min_tokens:
            return (*self._eos_token_ids, *params.stop_token_ids)
        return self._eos_token_ids if params.ignore_eos and request.matcher is not None else ()

    def _reweigh(self, row: Tensor, request: Request) -> Tensor:
        """Bias and penalties; the row itself if there are none."""
        params = request.params
        adjusted = row
        if params.logit_bias:
            adjusted = adjusted.clone()
            ids = torch.tensor(list(params.logit_bias))
            adjusted[ids] += torch.tensor(list(params.logit_bias.values()), dtype=row.dtype)
        if params.repetition_penalty != 1.0:
            seen = torch.tensor(sorted(set(request.token_ids)))
            adjusted = adjusted.clone() if adjusted is row else adjusted
            values = adjusted[seen]
            penalty = params.repetition_penalty
            adjusted[seen] = torch.where(values > 0, values / penalty, values * penalty)
        if (params.presence_penalty or params.frequency_penalty) and request.num_output_tokens:
            counts = Counter(request.output_token_ids)
            adjusted = adjusted.clone() if adjusted is row else adjusted
            times = torch.tensor(list(counts.values()), dtype=row.dtype)
            adjusted[torch.tensor(list(counts))] -= params.presence_penalty + params.frequency_penalty * times
        return adjusted


def _bit(i: int) -> int:
    """Of an int32."""
    return 1 << i if i < 31 else -(1 << 31)


def _draw(request: Request, allowed: Tensor | None) -> Draw:
    params = request.params
    uniform = 0.0 if params.greedy else _uniform(request.seed, request.num_tokens, int(allowed is not None))
    return Draw(uniform, params.temperature, params.top_k, params.top_p, params.min_p, allowed)


def _uniform(seed: int, position: int, which: int) -> float:
    """A number in [0, 1) for each (seed, position), the first or second: Philox, counter-based (Salmon et al. 2011)."""
    bits = np.random.Philox(key=seed & (2**64 - 1), counter=position)
    return float(np.random.Generator(bits).random(which + 1)[which])


def _logprobs(row: Tensor, token_id: int, num_top: int) -> list[tuple[int, float]]:
    logprobs = row.log_softmax(-1)
    top = logprobs.topk(num_top)
    return [(token_id, float(logprobs[token_id])), *zip(top.indices.tolist(), top.values.tolist(), strict=True)]
