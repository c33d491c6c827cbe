"""Log-probabilities of prompt tokens: transformers', whatever the chunks, the prefix cache and preemption do."""

from __future__ import annotations

import math

import pytest
import torch

from engine.errors import InvalidRequest
from engine.messages import PositionLogprobs, RequestOutput
from engine.sampling_params import SamplingParams
from tests.engine.conftest import greedy, run_all, tokens_of
from tests.engine.test_models import random_prompt
from tests.engine.tiny_models import reference_logits


def scores_of(outputs: list[RequestOutput]) -> list[PositionLogprobs]:
    """Of all prompt tokens but the first, which is checked to be there without one."""
    first, *others = [position for output in outputs for position in output.prompt_logprobs or ()]
    assert math.isnan(first.chosen.logprob)
    return others


def chosen_of(outputs: list[RequestOutput]) -> list[float]:
    return [position.chosen.logprob for position in scores_of(outputs)]


@pytest.mark.parametrize("variant", ["mixtral", "olmoe-gqa-clip", "qwen3"])
@pytest.mark.parametrize("chunk", [32, 512])
def test_each_prompt_token_has_the_log_probability_that_transformers_gives_it(checkpoint, make_engine, variant, chunk):
    directory, model = checkpoint(variant)
    prompt = random_prompt(150)  # more than the rows that are scored at once
    engine = make_engine(directory, scheduler={"max_num_batched_tokens": chunk})
    outputs = run_all(engine, {"a": (prompt, greedy(1, prompt_logprobs=3, logprobs=3))})["a"]
    expected = reference_logits(model, prompt).log_softmax(-1)
    scores = scores_of(outputs)
    assert [position.chosen.token_id for position in scores] == prompt[1:]
    chosen = torch.tensor([position.chosen.logprob for position in scores])
    torch.testing.assert_close(
        chosen, expected[:-1].gather(1, torch.tensor(prompt[1:])[:, None])[:, 0], atol=1e-3, rtol=0
    )
    top = expected[:-1].topk(3)
    assert [[entry.token_id for entry in position.top] for position in scores] == top.indices.tolist()
    assert scores[0].chosen.token == bytes([prompt[1]])
    assert len(tokens_of(outputs)) == 1
    assert outputs[-1].logprobs is not None
    assert sum(output.prompt_logprobs is not None for output in outputs) == -(-150 // chunk)


def test_a_cached_prefix_does_not_take_scores_away_nor_change_them(checkpoint, make_engine):
    directory, _ = checkpoint("olmoe")
    prompt = random_prompt(70)
    engine = make_engine(directory)
    scored = (prompt, greedy(4, prompt_logprobs=0))
    first = run_all(engine, {"a": scored})["a"]
    again = run_all(engine, {"b": scored, "c": (prompt, greedy(4))})
    assert chosen_of(again["b"]) == chosen_of(first)
    assert len(chosen_of(first)) == 69
    assert again["b"][-1].num_cached_tokens == 0
    assert again["c"][-1].num_cached_tokens == 64  # what a scored request computes is there for others
    assert engine.stats().prefix_queries_total == 70
    assert tokens_of(again["b"]) == tokens_of(again["c"]) == tokens_of(first)


def test_preemption_and_neighbours_do_not_change_scores(checkpoint, make_engine):
    directory, _ = checkpoint("mixtral")
    probe = make_engine(directory)
    block_nbytes = 16 * 1024**2 // probe._blocks.num_blocks
    scheduler = {"max_num_batched_tokens": 48}
    engine = make_engine(directory, max_model_len=96, kv_memory_nbytes=12 * block_nbytes, scheduler=scheduler)
    requests = {f"r{i}": (random_prompt(50, seed=i), greedy(30, prompt_logprobs=1)) for i in range(5)}
    together = run_all(engine, requests)
    assert engine.stats().preemptions_total > 0
    for name, request in requests.items():
        alone = run_all(probe, {name: request})[name]
        assert chosen_of(together[name]) == chosen_of(alone), name
        assert tokens_of(together[name]) == tokens_of(alone), name


def test_without_tokens_to_make_the_prompt_is_scored_and_that_is_all(checkpoint, make_engine):
    engine = make_engine(checkpoint("olmoe")[0], max_model_len=64)
    full = random_prompt(64)
    outputs = run_all(engine, {"a": (full, greedy(0, prompt_logprobs=1)), "b": (full[:1], greedy(0))})
    (only,) = outputs["a"]
    assert (only.token_ids, only.text, only.finish_reason, only.num_output_tokens) == ([], "", "length", 0)
    assert len(only.prompt_logprobs or ()) == 64
    (only,) = outputs["b"]
    assert (only.prompt_logprobs, only.finish_reason) == (None, "length")


def test_a_prompt_of_one_token_has_nothing_to_score(checkpoint, make_engine):
    outputs = run_all(make_engine(checkpoint("olmoe")[0]), {"a": ([7], greedy(2, prompt_logprobs=5))})["a"]
    assert scores_of(outputs) == []
    assert len(tokens_of(outputs)) == 2


@pytest.mark.parametrize(
    ("params", "param"), [({"max_tokens": -1}, "max_tokens"), ({"prompt_logprobs": 21}, "prompt_logprobs")]
)
def test_what_cannot_be_is_refused(params, param):
    with pytest.raises(InvalidRequest) as refusal:
        SamplingParams(**params)
    assert refusal.value.param == param
