"""server/routes/completions.py."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import httpx
import openai
import pytest

from engine.errors import EngineOverloaded
from tests.server.fake_engine import FakeEngine, Script, Token

URL = "/v1/completions"


def events(response: httpx.Response) -> list[Any]:
    data = [line.removeprefix("data: ") for line in response.text.splitlines() if line.startswith("data: ")]
    assert data[-1] == "[DONE]"
    return [json.loads(text) for text in data[:-1]]


async def test_an_answer_in_one_piece_has_every_field_of_the_schema(client: httpx.AsyncClient) -> None:
    answer = (await client.post(URL, json={"model": "fake", "prompt": "hi"})).json()
    assert answer.pop("id").startswith("cmpl-")
    assert answer.pop("created") > 0
    assert answer.pop("system_fingerprint").startswith("fg_")
    assert answer == {
        "object": "text_completion",
        "model": "fake",
        "choices": [{"index": 0, "text": "Paris.", "logprobs": None, "finish_reason": "stop", "stop_reason": None}],
        "usage": {
            "prompt_tokens": 2,
            "completion_tokens": 3,
            "total_tokens": 5,
            "prompt_tokens_details": {"cached_tokens": 0},
        },
    }


async def test_max_tokens_is_16_unless_given(client: httpx.AsyncClient, engine: FakeEngine) -> None:
    await client.post(URL, json={"prompt": "hi"})
    await client.post(URL, json={"prompt": "hi", "max_tokens": 40})
    assert [params.max_tokens for _, _, params in engine.seen] == [16, 40]


@pytest.mark.parametrize(
    ("prompt", "token_ids"),
    [
        ("hi", [[104, 105]]),
        (["a", "b"], [[97], [98]]),
        ([1, 2], [[1, 2]]),
        ([[1], [2, 3]], [[1], [2, 3]]),
    ],
)
async def test_prompts_are_strings_or_ids_one_or_many(
    client: httpx.AsyncClient, engine: FakeEngine, prompt: Any, token_ids: list[list[int]]
) -> None:
    answer = (await client.post(URL, json={"prompt": prompt})).json()
    assert sorted(seen for _, seen, _ in engine.seen) == token_ids
    assert len({request_id for request_id, _, _ in engine.seen}) == len(token_ids)
    assert [choice["index"] for choice in answer["choices"]] == list(range(len(token_ids)))
    assert answer["usage"]["prompt_tokens"] == sum(map(len, token_ids))


async def test_each_prompt_gets_its_own_text(client: httpx.AsyncClient, engine: FakeEngine) -> None:
    engine.script = lambda prompt: Script([Token(f"to {prompt[0]}", delay_s=0.02 / prompt[0])])
    answer = (await client.post(URL, json={"prompt": [[1], [2], [9]]})).json()
    assert [choice["text"] for choice in answer["choices"]] == ["to 1", "to 2", "to 9"]
    streamed = events(await client.post(URL, json={"prompt": [[1], [2], [9]], "stream": True}))
    texts = {choice["index"]: choice["text"] for chunk in streamed for choice in chunk["choices"] if choice["text"]}
    assert texts == {0: "to 1", 1: "to 2", 2: "to 9"}


async def test_more_prompts_than_run_at_a_time_take_turns(
    connect: Callable[..., httpx.AsyncClient], engine: FakeEngine
) -> None:
    most_open = 0

    def script(prompt: list[int]) -> Script:
        nonlocal most_open
        most_open = max(most_open, engine.num_open + 1)
        return Script([Token("x", delay_s=0.001)])

    engine.script = script
    answer = (await connect(max_parallel_prompts=3).post(URL, json={"prompt": [[1]] * 10})).json()
    assert len(answer["choices"]) == 10
    assert most_open == 3


@pytest.mark.parametrize("stream", [False, True])
async def test_one_refused_prompt_ends_the_others(client: httpx.AsyncClient, engine: FakeEngine, stream: bool) -> None:
    slow = Script([Token("x", delay_s=30.0)])
    engine.script = lambda prompt: Script(refusal=EngineOverloaded("full")) if prompt == [2] else slow
    response = await client.post(URL, json={"prompt": [[1], [2], [3]], "stream": stream})
    assert response.status_code == 503
    assert engine.num_open == 0


async def test_a_stream_ends_with_an_empty_text_and_the_reason(client: httpx.AsyncClient) -> None:
    body = {"prompt": "hi", "stream": True, "stream_options": {"include_usage": True}}
    chunks = events(await client.post(URL, json=body))
    assert [chunk["choices"][0]["text"] for chunk in chunks[:-1]] == ["Par", "is", ".", ""]
    assert [chunk["choices"][0]["finish_reason"] for chunk in chunks[:-1]] == [None, None, None, "stop"]
    assert all(chunk["usage"] is None for chunk in chunks[:-1])
    assert chunks[-1]["choices"] == []
    assert chunks[-1]["usage"]["total_tokens"] == 5


async def test_logprobs_are_parallel_lists_with_offsets_into_the_text(
    client: httpx.AsyncClient, engine: FakeEngine
) -> None:
    engine.script = Script([Token("é "), Token("", b"\xe2\x82"), Token("€", b"\xac"), Token("!")])
    answer = (await client.post(URL, json={"prompt": "hi", "logprobs": 1})).json()
    logprobs = answer["choices"][0]["logprobs"]
    assert answer["choices"][0]["text"] == "é €!"
    assert logprobs["tokens"] == ["é ", "\ufffd", "\ufffd", "!"]
    assert logprobs["text_offset"] == [0, 2, 2, 3]
    assert logprobs["token_logprobs"] == [-0.5] * 4
    assert logprobs["top_logprobs"][0] == {"é ": -0.5}
    chunks = events(await client.post(URL, json={"prompt": "hi", "logprobs": 1, "stream": True}))
    assert [chunk["choices"][0]["logprobs"]["text_offset"] for chunk in chunks[:-1]] == [[0], [2], [2], [3]]


async def test_logprobs_of_zero_still_tell_the_chosen_token(client: httpx.AsyncClient) -> None:
    answer = (await client.post(URL, json={"prompt": "hi", "logprobs": 0, "max_tokens": 1})).json()
    assert answer["choices"][0]["logprobs"]["top_logprobs"] == [{"Par": -0.5}]


async def test_an_echo_is_the_prompt_before_the_answer(client: httpx.AsyncClient) -> None:
    answer = (await client.post(URL, json={"prompt": ["hé", "yo"], "echo": True})).json()
    assert [choice["text"] for choice in answer["choices"]] == ["héParis.", "yoParis."]
    answer = (await client.post(URL, json={"prompt": [104, 105], "echo": True, "max_tokens": 0})).json()
    assert answer["choices"][0]["text"] == "hi"
    assert answer["choices"][0]["finish_reason"] == "length"
    assert answer["usage"]["completion_tokens"] == 0
    chunks = events(await client.post(URL, json={"prompt": "hi", "echo": True, "stream": True}))
    assert [chunk["choices"][0]["text"] for chunk in chunks] == ["hi", "Par", "is", ".", ""]


async def test_an_echo_has_log_probabilities_of_every_prompt_token_but_the_first(
    client: httpx.AsyncClient, engine: FakeEngine
) -> None:
    body = {"prompt": list("h€i".encode()), "echo": True, "logprobs": 1, "max_tokens": 1}
    logprobs = (await client.post(URL, json=body)).json()["choices"][0]["logprobs"]
    assert logprobs["tokens"] == ["h", "\ufffd", "\ufffd", "\ufffd", "i", "Par"]
    assert logprobs["token_logprobs"] == [None, -2.26, -1.3, -1.72, -1.05, -0.5]
    assert logprobs["top_logprobs"] == [
        None,
        {"x": -0.1, "\ufffd": -2.26},
        {"x": -0.1, "\ufffd": -1.3},
        {"x": -0.1, "\ufffd": -1.72},
        {"x": -0.1, "i": -1.05},
        {"Par": -0.5},
    ]
    assert logprobs["text_offset"] == [0, 1, 1, 1, 2, 3]
    assert engine.seen[-1][2].prompt_logprobs == 1
    first, second, *_ = events(await client.post(URL, json={**body, "stream": True}))
    streamed = {
        name: values + second["choices"][0]["logprobs"][name]
        for name, values in first["choices"][0]["logprobs"].items()
    }
    assert streamed == logprobs


async def test_log_probabilities_of_the_prompt_are_not_computed_where_it_is_not_echoed(
    client: httpx.AsyncClient, engine: FakeEngine
) -> None:
    await client.post(URL, json={"prompt": "hi", "logprobs": 1})
    await client.post(URL, json={"prompt": "hi", "echo": True})
    assert [params.prompt_logprobs for _, _, params in engine.seen] == [None, None]


@pytest.mark.parametrize("stream", [False, True])
async def test_n_choices_of_each_prompt_are_in_order_and_share_its_computation(
    client: httpx.AsyncClient, engine: FakeEngine, stream: bool
) -> None:
    open_before: list[int] = []

    def script(prompt: list[int]) -> Script:
        open_before.append(engine.num_open)
        return Script([Token(f"to {prompt[0]}", delay_s=0.05), Token(".", delay_s=0.05)])

    engine.script = script
    body = {"prompt": [[1], [2]], "n": 3, "best_of": 3, "seed": 7, "echo": True, "logprobs": 0, "stream": stream}
    response = await client.post(URL, json={**body, "stream_options": {"include_usage": True}} if stream else body)
    if stream:
        chunks = events(response)
        texts = [""] * 6
        for choice in (choice for chunk in chunks for choice in chunk["choices"]):
            texts[choice["index"]] += choice["text"]
        usage = chunks[-1]["usage"]
    else:
        texts = [choice["text"] for choice in response.json()["choices"]]
        assert all(len(choice["logprobs"]["tokens"]) == 3 for choice in response.json()["choices"])
        usage = response.json()["usage"]
    assert texts == ["\x01to 1."] * 3 + ["\x02to 2."] * 3
    assert (usage["prompt_tokens"], usage["completion_tokens"]) == (2, 12)  # a prompt is counted once
    assert open_before == [0, 1, 2, 3, 4, 5]
    assert [prompt for _, prompt, _ in engine.seen[:2]] == [[1], [2]]  # the others begin when these have been computed
    seeds = {params.seed for _, _, params in engine.seen}
    assert len(seeds) == 3  # one for each place, the same of both prompts
    assert 7 in seeds
    assert [params.prompt_logprobs for _, _, params in engine.seen] == [0, 0, None, None, None, None]


async def test_without_a_seed_the_engine_draws_one_for_each_choice(
    client: httpx.AsyncClient, engine: FakeEngine
) -> None:
    await client.post(URL, json={"prompt": "hi", "n": 4})
    assert [params.seed for _, _, params in engine.seen] == [None] * 4


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"best_of": 2}, "best_of"),
        ({"best_of": 1, "n": 2}, "best_of"),
        ({"n": 128, "prompt": ["hi"] * 9}, "n"),
        ({"echo": True, "prompt": [999]}, "prompt"),
    ],
)
async def test_more_choices_than_are_told_or_than_one_request_may_have_are_refused(
    client: httpx.AsyncClient, engine: FakeEngine, body: dict[str, Any], param: str
) -> None:
    response = await client.post(URL, json={"prompt": "hi", **body})
    assert response.status_code == 400
    assert response.json()["error"]["param"] == param
    assert engine.seen == []


@pytest.mark.parametrize(
    ("prompt", "param"),
    [
        ([], "prompt"),
        ("", "prompt"),
        ([[]], "prompt"),
        ([256], "prompt"),
        ([-1], "prompt"),
        ([True], "prompt"),
        ([1.5], "prompt"),
        (["a", 1], "prompt"),
        ([[1], "a"], "prompt"),
        ({}, "prompt"),
        (None, "prompt"),
        ([[1]] * 257, "prompt"),
    ],
)
async def test_a_bad_prompt_is_refused(client: httpx.AsyncClient, prompt: Any, param: str) -> None:
    response = await client.post(URL, json={"prompt": prompt})
    assert response.status_code == 400
    assert response.json()["error"]["param"] == param


async def test_the_openai_client_reads_both_ways_of_answering(client: httpx.AsyncClient) -> None:
    sdk = openai.AsyncOpenAI(api_key="k", base_url="http://test/v1", http_client=client, max_retries=0)
    whole = await sdk.completions.create(model="fake", prompt="hi", logprobs=2)
    assert whole.choices[0].text == "Paris."
    stream = await sdk.completions.create(model="fake", prompt="hi", stream=True)
    assert "".join([chunk.choices[0].text async for chunk in stream]) == "Paris."
