"""From logits to tokens, each request by its own parameters and its own random numbers."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from engine.request import Request

_NUCLEUS = 512  # tokens that usually make up any top_p


@dataclass(frozen=True, slots=True)
class SampledToken:
    """A chosen token; `logprobs` are (id, natural-log probability), the chosen one first, then the top ones."""

    token_id: int
    logprobs: list[tuple[int, float]] | None


@dataclass(slots=True)
class Allowed:
    """Of the logits, those of tokens that may come next; those of others are minus infinity, or do not matter."""

    rows: list[Tensor]  # float32 [V] each
    likeliest: list[int]  # of each row

    def only(self, i: int) -> Allowed:
        return Allowed([self.rows[i]], [self.likeliest[i]])


class Sampler:
    """Every draw depends on the request's seed and position alone: batch, preemption and timing do not change it."""

    def __init__(self, eos_token_ids: Sequence[int]) -> None:
        self._eos_token_ids = list(eos_token_ids)

    def sample(self, logits: Tensor, requests: Sequence[Request], allowed: Allowed | None = None) -> list[SampledToken]:
        """float32 logits [n, V], one row a request -> one token each. `logits` is not changed.

        Tokens are chosen of what is `allowed`; log-probabilities are of `logits`.
        """
        if not requests:
            return []
        allowed = allowed or Allowed(list(logits), logits.argmax(-1).tolist())
        return [
            self._sample_row(row, allowed_row, request, likeliest)
            for row, allowed_row, request, likeliest in zip(
                logits, allowed.rows, requests, allowed.likeliest, strict=True
            )
        ]

    def _sample_row(self, row: Tensor, allowed: Tensor, request: Request, likeliest: int) -> SampledToken:
        params = request.params
        adjusted = self._adjust(allowed, request)
        if params.greedy:
            token_id = likeliest if adjusted is allowed else int(adjusted.argmax())
        else:
            token_id = _draw(adjusted, request)
        return SampledToken(token_id, None if params.logprobs is None else _logprobs(row, token_id, params.logprobs))

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


def _draw(logits: Tensor, request: Request) -> int:
    """One draw by inversion: a uniform number against the cumulative distribution of the tokens that are left."""
    params = request.params
    ids: Tensor | None = None
    if 0 < params.top_k < len(logits):
        logits, ids = logits.topk(params.top_k)  # sorted, best first
    scaled = logits.double() / params.temperature
    if params.top_p < 1.0 and ids is None:
        probs, ids = _nucleus(scaled, params.top_p)
    else:
        probs = scaled.softmax(-1)
    if params.top_p < 1.0:
        probs = torch.where(probs.cumsum(-1) - probs < params.top_p, probs, 0.0)  # the token that crosses stays
    if params.min_p > 0.0:
        probs = torch.where(probs >= params.min_p * probs.max(), probs, 0.0)
    cumulative = probs.cumsum(-1)
    target = _uniform(request.seed, request.num_tokens) * float(cumulative[-1])
    at = int(torch.searchsorted(cumulative, target, right=True))
    at = min(at, int(probs.nonzero()[-1]))  # rounding at the very end
    return at if ids is None else int(ids[at])


def _nucleus(scaled: Tensor, top_p: float) -> tuple[Tensor, Tensor]:
    """The largest probabilities of logits [V], best first, at least so many that they make up top_p, and their ids."""
    total = scaled.logsumexp(-1)
    if len(scaled) > _NUCLEUS:  # sorting all of a vocabulary costs more than a small model's step
        values, ids = scaled.topk(_NUCLEUS)
        probs = (values - total).exp()
        if float(probs.sum()) > top_p:
            return probs, ids
    values, ids = scaled.sort(descending=True, stable=True)
    return (values - total).exp(), ids


def _uniform(seed: int, position: int) -> float:
    """A number in [0, 1) for each (seed, position): Philox, counter-based (Salmon et al. 2011)."""
    bits = np.random.Philox(key=seed & (2**64 - 1), counter=position)
    return float(np.random.Generator(bits).random())


def _logprobs(row: Tensor, token_id: int, num_top: int) -> list[tuple[int, float]]:
    logprobs = row.log_softmax(-1)
    top = logprobs.topk(num_top)
    return [(token_id, float(logprobs[token_id])), *zip(top.indices.tolist(), top.values.tolist(), strict=True)]
