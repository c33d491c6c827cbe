"""What lm-eval's `local-completions` asks for a loglikelihood, and makes of the answer, beside transformers' own.

The requests and the reading of the answers are those of lm_eval.models.openai_completions.
"""

from __future__ import annotations

import random
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch

from engine.async_engine import AsyncEngine
from engine.config import CacheConfig, EngineConfig, SchedulerConfig
from server.app import create_app
from server.settings import AppSettings
from tests.engine.tiny_models import VOCAB_SIZE, make_checkpoint, reference_logits

Pair = tuple[list[int], list[int]]  # context, continuation


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, torch.nn.Module]:
    directory = tmp_path_factory.mktemp("olmoe")
    return directory, make_checkpoint(directory, "olmoe")


@pytest.fixture
async def client(model: tuple[Path, torch.nn.Module]) -> AsyncIterator[httpx.AsyncClient]:
    config = EngineConfig(
        model=model[0],
        max_model_len=128,
        kv_memory_nbytes=16 * 2**20,
        cache=CacheConfig(format="float32"),
        scheduler=SchedulerConfig(max_num_seqs=8, max_num_batched_tokens=64),
    )
    engine = AsyncEngine(config)
    await engine.start()
    app = create_app(engine, AppSettings(served_names=("tiny",), max_parallel_prompts=8))
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://test", timeout=60) as client:
        yield client
    await engine.stop()


def pairs() -> list[Pair]:
    """Several continuations of a context, as in a multiple-choice task, which so share a prefix; and odd lengths."""
    rng = random.Random(0)
    draw = lambda n: rng.choices(range(VOCAB_SIZE), k=n)  # noqa: E731
    shared = draw(70)
    made = [(shared, draw(n)) for n in (1, 5, 20, 31)]
    return [*made, (draw(1), draw(1)), (draw(15), draw(17)), (draw(100), draw(27)), (draw(64), draw(8))]


def read(choice: dict[str, Any], num_context: int) -> tuple[list[float], bool]:
    """`LocalCompletionsAPI.parse_logprobs`: the last token is the one made after the prompt."""
    logprobs = choice["logprobs"]["token_logprobs"][num_context:-1]
    tops = choice["logprobs"]["top_logprobs"][num_context:-1]
    return logprobs, all(logprob == max(top.values()) for logprob, top in zip(logprobs, tops, strict=True))


def theirs(model: torch.nn.Module, pair: Pair) -> tuple[list[float], bool]:
    context, continuation = pair
    logits = reference_logits(model, context + continuation)[len(context) - 1 : -1]
    targets = torch.tensor(continuation)
    logprobs = logits.log_softmax(-1).gather(1, targets[:, None])[:, 0]
    return logprobs.tolist(), bool((logits.argmax(-1) == targets).all())


async def test_a_loglikelihood_is_that_of_transformers_to_a_thousandth_per_token(
    client: httpx.AsyncClient, model: tuple[Path, torch.nn.Module]
) -> None:
    asked = pairs()
    greedy = reference_logits(model[1], asked[0][0]).argmax(-1)[-1].item()
    asked.append((asked[0][0], [greedy]))  # the likeliest continuation is told to be it
    body = {
        "model": "tiny",
        "prompt": [context + continuation for context, continuation in asked],
        "temperature": 0,
        "max_tokens": 1,
        "logprobs": 1,
        "seed": 1234,
        "echo": True,
    }
    for _ in range(2):  # the second time the prefixes are in the cache
        response = await client.post("/v1/completions", json=body)
        choices = sorted(response.json()["choices"], key=lambda choice: choice["index"])
        assert len(choices) == len(asked)
        seen_greedy = []
        for choice, pair in zip(choices, asked, strict=True):
            assert choice["logprobs"]["token_logprobs"][0] is None
            assert len(choice["logprobs"]["tokens"]) == sum(map(len, pair)) + 1
            logprobs, is_greedy = read(choice, len(pair[0]))
            expected, expected_greedy = theirs(model[1], pair)
            assert logprobs == pytest.approx(expected, abs=1e-3)
            assert is_greedy == expected_greedy
            seen_greedy.append(is_greedy)
        assert seen_greedy[-1]
        assert not all(seen_greedy)


async def test_text_and_ids_and_no_token_to_make_give_the_same(client: httpx.AsyncClient) -> None:
    text = "The sun rises in the éast"
    tokens = (await client.post("/tokenize", json={"prompt": text})).json()["tokens"]
    seen = []
    for prompt in (text, tokens):
        body = {"prompt": prompt, "max_tokens": 0, "logprobs": 1, "echo": True}
        choice = (await client.post("/v1/completions", json=body)).json()["choices"][0]
        assert choice["text"] == text
        seen.append(choice["logprobs"])
    assert seen[0] == seen[1]
    assert [text[at] for at in seen[0]["text_offset"]] == [*text[:21], "é", "é", *text[22:]]
