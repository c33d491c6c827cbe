from __future__ import annotations

import math
from collections import Counter
from typing import Any

import pytest
import torch

from engine.detokenizer import Detokenizer
from engine.request import Request
from engine.sampler import Sampler
from engine.sampling_params import SamplingParams
from kernels.backend import choose_backend, make_choose

VOCAB = 16
EOS = 15
SAMPLER = Sampler([EOS], make_choose(choose_backend("auto", 2), 2))


def make_request(prompt: list[int] | None = None, output: list[int] | None = None, **params: Any) -> Request:
    prompt, output = prompt or [0], output or []
    sampling = SamplingParams(**params)
    detokenizer = Detokenizer(None, [])  # type: ignore[arg-type]
    return Request("r", prompt + output, len(prompt), sampling, 10_000, sampling.seed or 0, detokenizer)


def sample_one(logits: torch.Tensor, request: Request) -> int:
    return SAMPLER.sample([logits], [request])[0].token_id


def draws(logits: torch.Tensor, num: int = 3000, **params: Any) -> Counter[int]:
    """The tokens of many seeds."""
    requests = [make_request(seed=seed, **params) for seed in range(num)]
    return Counter(token.token_id for token in SAMPLER.sample([logits] * num, requests))


@pytest.fixture
def logits() -> torch.Tensor:
    return torch.randn(VOCAB, generator=torch.Generator().manual_seed(0))


def test_temperature_zero_takes_the_best(logits):
    assert sample_one(logits, make_request(temperature=0.0)) == int(logits.argmax())


@pytest.mark.parametrize("temperature", [0.5, 1.0, 1.7])
def test_draws_follow_the_softmax_at_the_temperature(logits, temperature: float):
    counts, probs = draws(logits, temperature=temperature), (logits / temperature).softmax(-1)
    for token_id, prob in enumerate(probs.tolist()):
        assert abs(counts[token_id] / 3000 - prob) < 4 * math.sqrt(prob * (1 - prob) / 3000) + 1e-3


def test_top_k_keeps_the_k_best(logits):
    assert set(draws(logits, top_k=3)) == set(logits.topk(3).indices.tolist())


def test_top_p_keeps_the_smallest_set_that_reaches_p(logits):
    probs, ids = logits.softmax(-1).sort(descending=True)
    num_kept = int((probs.cumsum(-1) < 0.6).sum()) + 1
    assert set(draws(logits, top_p=0.6)) == set(ids[:num_kept].tolist())
    assert set(draws(logits, top_p=1e-6)) == {int(ids[0])}


def test_min_p_keeps_what_is_near_the_best(logits):
    probs = logits.softmax(-1)
    kept = (probs >= 0.3 * probs.max()).nonzero().flatten().tolist()
    assert set(draws(logits, min_p=0.3)) == set(kept)
    assert len(kept) > 1


def test_a_draw_depends_on_seed_and_position_alone(logits):
    requests = [make_request(seed=7, output=[1] * n) for n in range(40)]
    alone = [sample_one(logits, request) for request in requests]
    others = [make_request(seed=seed) for seed in range(40)]
    together = SAMPLER.sample([logits] * 80, [*others, *requests])
    assert [token.token_id for token in together[40:]] == alone
    assert len(set(alone)) > 3
    assert alone != [sample_one(logits, make_request(seed=8, output=[1] * n)) for n in range(40)]


def test_logit_bias_forces_and_forbids(logits):
    worst, best = int(logits.argmin()), int(logits.argmax())
    assert sample_one(logits, make_request(temperature=0.0, logit_bias={worst: 100.0})) == worst
    assert sample_one(logits, make_request(temperature=0.0, logit_bias={best: -100.0})) != best


def test_repetition_penalty_counts_prompt_and_output_whatever_the_sign():
    logits = torch.tensor([2.0, 1.9, -0.5, -3.0])
    assert sample_one(logits, make_request(prompt=[0], temperature=0.0, repetition_penalty=1.2)) == 1
    assert sample_one(logits, make_request(prompt=[3], output=[0, 1], temperature=0.0, repetition_penalty=9.0)) == 0
    negative = torch.tensor([-1.0, -1.1])
    assert sample_one(negative, make_request(prompt=[0], temperature=0.0, repetition_penalty=1.5)) == 1


def test_presence_and_frequency_penalties_count_the_output_only():
    logits = torch.tensor([2.0, 1.5, 0.9])
    assert sample_one(logits, make_request(prompt=[0] * 5, temperature=0.0, presence_penalty=1.0)) == 0
    assert sample_one(logits, make_request(output=[0], temperature=0.0, presence_penalty=1.0)) == 1
    assert sample_one(logits, make_request(output=[0, 0, 1], temperature=0.0, frequency_penalty=0.6)) == 1
    assert sample_one(logits, make_request(output=[0, 0, 1], temperature=0.0, frequency_penalty=1.0)) == 2


def test_ends_are_not_sampled_before_min_tokens():
    logits = torch.zeros(VOCAB)
    logits[EOS], logits[3] = 9.0, 8.0
    assert sample_one(logits, make_request(temperature=0.0, min_tokens=1)) == 3
    assert sample_one(logits, make_request(temperature=0.0, min_tokens=1, stop_token_ids=(3,))) not in (3, EOS)
    assert sample_one(logits, make_request(output=[1], temperature=0.0, min_tokens=1)) == EOS


def test_logprobs_are_of_the_models_own_distribution_the_chosen_one_first(logits):
    request = make_request(temperature=0.0, logprobs=3, logit_bias={5: 100.0})
    token = SAMPLER.sample([logits], [request])[0]
    logprobs = logits.log_softmax(-1)
    assert token.token_id == 5
    assert token.logprobs is not None
    assert token.logprobs[0] == (5, pytest.approx(float(logprobs[5])))
    assert [i for i, _ in token.logprobs[1:]] == logits.topk(3).indices.tolist()
    assert SAMPLER.sample([logits], [make_request()])[0].logprobs is None


def test_the_logits_are_left_as_they_were(logits):
    before = logits.clone()
    params = {"logit_bias": {1: 5.0}, "repetition_penalty": 2.0, "presence_penalty": 1.0, "min_tokens": 3, "top_k": 4}
    sample_one(logits, make_request(output=[1, 2], **params))
    assert torch.equal(logits, before)
