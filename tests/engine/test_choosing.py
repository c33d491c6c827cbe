"""Tokens of structured requests: their distribution, whether a mask was looked at or not."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from typing import Any

import pytest
import torch

from engine.choosing import choose_tokens
from engine.request import Request
from engine.sampler import SampledToken
from tests.engine.test_sampler import EOS, SAMPLER, VOCAB, make_request

ALLOWED = [2, 5, 7, 11]


class Matcher:
    """Allows some tokens, wherever it stands."""

    def __init__(self, allowed: Sequence[int] = ALLOWED) -> None:
        self.allowed = list(allowed)

    def validate_tokens(self, tokens: list[int]) -> int:
        return int(tokens[0] in self.allowed)


class Masks:
    """In place of `Constraints`: counts the masks that are asked for."""

    def __init__(self) -> None:
        self.num = 0

    def masks(self, requests: Sequence[Request], which: Sequence[int]) -> tuple[list[torch.Tensor], dict[int, Any]]:
        self.num += len(which)
        words = [sum(1 << token for token in requests[i].matcher.allowed) for i in which]  # type: ignore[union-attr]
        return [torch.tensor([word], dtype=torch.int32) for word in words], {}


@pytest.fixture
def logits() -> torch.Tensor:
    return torch.randn(VOCAB, generator=torch.Generator().manual_seed(5))


def choose(logits: torch.Tensor, requests: list[Request]) -> tuple[list[Any], int]:
    masks = Masks()
    chosen = choose_tokens(logits.expand(len(requests), -1), requests, SAMPLER, masks)  # type: ignore[arg-type]
    return chosen, masks.num


def structured(allowed: Sequence[int] = ALLOWED, **params: Any) -> Request:
    request = make_request(**params)
    request.matcher = Matcher(allowed)  # type: ignore[assignment]
    return request


def probabilities(logits: torch.Tensor, params: dict[str, Any], tokens: Sequence[int]) -> torch.Tensor:
    """Of all tokens, [VOCAB], where only some may be drawn."""
    logits = logits.clone()
    for token, bias in params.get("logit_bias", {}).items():
        logits[token] += bias
    weights = torch.zeros(VOCAB)
    weights[list(tokens)] = (logits[list(tokens)] / params.get("temperature", 1.0)).softmax(-1)
    order = weights.argsort(descending=True)
    if "top_k" in params:
        weights[order[params["top_k"] :]] = 0.0
    if "top_p" in params:
        weights[order[1:][weights[order].cumsum(-1)[:-1] >= params["top_p"]]] = 0.0
    if "min_p" in params:
        weights[weights < params["min_p"] * weights.max()] = 0.0
    return weights / weights.sum()


def assert_drawn_from(chosen: Sequence[Any], expected: torch.Tensor) -> None:
    num = len(chosen)
    counts = Counter(token.token_id for token in chosen)
    for token, weight in enumerate(expected.tolist()):
        assert abs(counts[token] / num - weight) < 4 * math.sqrt(weight * (1 - weight) / num) + 1e-9


@pytest.mark.parametrize("params", [{}, {"temperature": 0.6}, {"logit_bias": {2: 1.5}}])
def test_what_is_drawn_is_the_masked_distribution(logits, params: dict[str, Any]):
    chosen, num_masked = choose(logits, [structured(seed=seed, **params) for seed in range(4000)])
    assert_drawn_from(chosen, probabilities(logits, params, ALLOWED))
    assert 0 < num_masked < len(chosen)


@pytest.mark.parametrize("params", [{"top_k": 3}, {"top_p": 0.8}, {"min_p": 0.2}, {"top_p": 0.9, "temperature": 0.7}])
def test_filters_cut_what_is_allowed_only_where_the_grammar_refused_the_models_own(logits, params: dict[str, Any]):
    logits[11] = 1.5  # so that the model's own likeliest are of both kinds
    chosen, num_masked = choose(logits, [structured(seed=seed, **params) for seed in range(4000)])
    free = probabilities(logits, params, range(VOCAB))
    taken = torch.zeros(VOCAB)
    taken[ALLOWED] = free[ALLOWED]
    assert_drawn_from(chosen, taken + (1 - taken.sum()) * probabilities(logits, params, ALLOWED))
    assert 0 < num_masked < len(chosen)


def test_the_likeliest_is_looked_for_among_all_first(logits):
    best = int(logits.argmax())
    for allowed, num in (([best, 3], 0), ([3, 8], 1)):
        chosen, num_masked = choose(logits, [structured(allowed, temperature=0.0), make_request(temperature=0.0)])
        assert [token.token_id for token in chosen] == [max(allowed, key=lambda i: float(logits[i])), best]
        assert num_masked == num


def test_a_request_chooses_alone_as_in_company(logits):
    requests = [structured(seed=i) if i % 2 else make_request(seed=i) for i in range(60)]
    together, _ = choose(logits, requests)
    assert together == [choose(logits, [request])[0][0] for request in requests]


def test_ends_come_only_where_the_grammar_allows_nothing_else():
    logits = torch.zeros(VOCAB)
    logits[EOS] = 20.0
    for params in ({"ignore_eos": True}, {"min_tokens": 2}):
        for allowed, token in (([EOS, 4], 4), ([EOS], EOS)):
            for temperature in (0.0, 1.0):
                chosen, _ = choose(logits, [structured(allowed, temperature=temperature, seed=1, **params)])
                assert chosen[0].token_id == token


def test_a_grammar_that_allows_nothing_fails_its_request_alone(logits):
    chosen, _ = choose(logits, [make_request(seed=1), structured([], seed=2), structured(seed=3)])
    assert isinstance(chosen[0], SampledToken)
    assert isinstance(chosen[1], ValueError)
    assert chosen[2].token_id in ALLOWED
