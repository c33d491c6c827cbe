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
        self, logits: Tensor, requests: Sequence[Request], allowed: Sequence[Tensor] | None = None
    ) -> list[SampledToken]:
        """float32 logits [n, V], one row a request -> one token each. `logits` is not changed.

        Tokens are chosen from the rows `allowed`, float32 [V] each, minus infinity for what may not come next;
        log-probabilities are of `logits`. Raises `ValueError` if a request has nothing to choose from.
        """
        if not requests:
            return []
        rows = [self._adjust(row, request) for row, request in zip(allowed or logits.unbind(), requests, strict=True)]
        tokens = self._choose(rows, [_draw(request) for request in requests])
        return [
            SampledToken(token, None if (num := request.params.logprobs) is None else _logprobs(row, token, num))
            for row, token, request in zip(logits, tokens, requests, strict=True)
        ]

    def _adjust(self, row: Tensor, request: Request) -> Tensor:
        """Bias, penalties, forbidden ends; the row itself if there are none."""
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
        too_early = request.num_output_tokens < params.min_tokens
        if too_early or (params.ignore_eos and request.matcher is not None):
            ends = (*self._eos_token_ids, *params.stop_token_ids) if too_early else self._eos_token_ids
            going_on = adjusted.clone()
            going_on[[token_id for token_id in ends if token_id < len(row)]] = float("-inf")
            # a grammar may allow nothing but the end
            if request.matcher is None or bool((going_on > float("-inf")).any()):
                adjusted = going_on
        return adjusted


def takes_likeliest(request: Request) -> bool:
    """Whether the token is the one with the largest logit, which nothing adjusts."""
    params = request.params
    return (
        params.greedy
        and not (params.logit_bias or params.presence_penalty or params.frequency_penalty or params.ignore_eos)
        and params.repetition_penalty == 1.0
        and request.num_output_tokens >= params.min_tokens
    )


def _draw(request: Request) -> Draw:
    params = request.params
    uniform = 0.0 if params.greedy else _uniform(request.seed, request.num_tokens)
    return Draw(uniform, params.temperature, params.top_k, params.top_p, params.min_p)


def _uniform(seed: int, position: int) -> float:
    """A number in [0, 1) for each (seed, position): Philox, counter-based (Salmon et al. 2011)."""
    bits = np.random.Philox(key=seed & (2**64 - 1), counter=position)
    return float(np.random.Generator(bits).random())


def _logprobs(row: Tensor, token_id: int, num_top: int) -> list[tuple[int, float]]:
    logprobs = row.log_softmax(-1)
    top = logprobs.topk(num_top)
    return [(token_id, float(logprobs[token_id])), *zip(top.indices.tolist(), top.values.tolist(), strict=True)]
