"""server/routes/chat.py, through HTTP and through the real openai client."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from typing import Any

import httpx
import openai
import pytest

from engine.errors import EngineDead, EngineOverloaded, InvalidRequest
from tests.server.fake_engine import FakeEngine, Script, Token

URL = "/v1/chat/completions"
HELLO = [{"role": "user", "content": "hi"}]


def body(**fields: Any) -> dict[str, Any]:
    return {"model": "fake", "messages": HELLO, **fields}


def events(response: httpx.Response) -> list[Any]:
    """The data of each event, parsed; the last must be [DONE]."""
    data = [line.removeprefix("data: ") for line in response.text.splitlines() if line.startswith("data: ")]
    assert data[-1] == "[DONE]"
    return [json.loads(text) for text in data[:-1]]


async def test_an_answer_in_one_piece_has_every_field_of_the_schema(client: httpx.AsyncClient) -> None:
    response = await client.post(URL, json=body())
    assert response.status_code == 200
    answer = response.json()
    assert answer.pop("id").startswith("chatcmpl-")
    assert answer.pop("created") > 0
    assert answer.pop("system_fingerprint").startswith("fg_")
    assert answer == {
        "object": "chat.completion",
        "model": "fake",
        "choices": [
            {
                "index": 0,
                "message": {"role": "assistant", "content": "Paris.", "refusal": None, "annotations": []},
                "logprobs": None,
                "finish_reason": "stop",
                "stop_reason": None,
            }
        ],
        "usage": {
            "prompt_tokens": 19,
            "completion_tokens": 3,
            "total_tokens": 22,
            "prompt_tokens_details": {"cached_tokens": 0},
        },
    }


async def test_a_stream_is_role_then_deltas_then_an_empty_delta_with_the_reason(client: httpx.AsyncClient) -> None:
    response = await client.post(URL, json=body(stream=True))
    assert response.headers["content-type"].startswith("text/event-stream")
    assert response.headers["cache-control"] == "no-cache"
    assert response.headers["x-accel-buffering"] == "no"
    chunks = events(response)
    assert len({chunk["id"] for chunk in chunks}) == 1
    assert all("usage" not in chunk for chunk in chunks)
    assert [chunk["choices"][0]["delta"] for chunk in chunks] == [
        {"role": "assistant", "content": ""},
        {"content": "Par"},
        {"content": "is"},
        {"content": "."},
        {},
    ]
    assert [chunk["choices"][0]["finish_reason"] for chunk in chunks] == [None] * 4 + ["stop"]


async def test_include_usage_adds_one_last_chunk_and_null_to_the_others(
    client: httpx.AsyncClient, engine: FakeEngine
) -> None:
    engine.script = Script(num_cached_tokens=16)
    chunks = events(await client.post(URL, json=body(stream=True, stream_options={"include_usage": True})))
    assert all(chunk["usage"] is None for chunk in chunks[:-1])
    assert chunks[-1]["choices"] == []
    assert chunks[-1]["usage"] == {
        "prompt_tokens": 19,
        "completion_tokens": 3,
        "total_tokens": 22,
        "prompt_tokens_details": {"cached_tokens": 16},
    }


async def test_a_token_without_text_makes_no_chunk_unless_it_has_logprobs(
    client: httpx.AsyncClient, engine: FakeEngine
) -> None:
    engine.script = Script([Token("", b"\xe2\x82"), Token("€", b"\xac")])
    assert len(events(await client.post(URL, json=body(stream=True)))) == 3
    chunks = events(await client.post(URL, json=body(stream=True, logprobs=True)))
    assert len(chunks) == 4
    assert chunks[1]["choices"][0]["delta"] == {"content": ""}
    assert chunks[1]["choices"][0]["logprobs"]["content"][0]["bytes"] == [0xE2, 0x82]


async def test_logprobs_have_the_chosen_token_and_the_best_ones(client: httpx.AsyncClient) -> None:
    answer = (await client.post(URL, json=body(logprobs=True, top_logprobs=2, max_tokens=1))).json()
    assert answer["choices"][0]["finish_reason"] == "length"
    assert answer["choices"][0]["logprobs"] == {
        "content": [
            {
                "token": "Par",
                "logprob": -0.5,
                "bytes": [80, 97, 114],
                "top_logprobs": [
                    {"token": "Par", "logprob": -0.5, "bytes": [80, 97, 114]},
                    {"token": "x0", "logprob": -1.0, "bytes": [120, 48]},
                ],
            }
        ],
        "refusal": None,
    }


async def test_every_sampling_field_reaches_the_engine(client: httpx.AsyncClient, engine: FakeEngine) -> None:
    fields = {
        "temperature": 0,
        "top_p": 0.9,
        "top_k": -1,
        "min_p": 0.1,
        "seed": 7,
        "frequency_penalty": 0.5,
        "presence_penalty": -0.5,
        "repetition_penalty": 1.1,
        "logit_bias": {"5": -100},
        "stop": ["a", "b"],
        "stop_token_ids": [9],
        "max_tokens": 3,
        "max_completion_tokens": 4,
        "min_tokens": 2,
        "ignore_eos": True,
        "skip_special_tokens": False,
    }
    assert (await client.post(URL, json=body(**fields))).status_code == 200
    params = engine.seen[0][2]
    assert (params.temperature, params.top_p, params.top_k, params.min_p, params.seed) == (0.0, 0.9, 0, 0.1, 7)
    assert (params.frequency_penalty, params.presence_penalty, params.repetition_penalty) == (0.5, -0.5, 1.1)
    assert (params.logit_bias, params.stop, params.stop_token_ids) == ({5: -100.0}, ("a", "b"), (9,))
    assert (params.max_tokens, params.min_tokens, params.ignore_eos) == (4, 2, True)
    assert (params.skip_special_tokens, params.logprobs) == (False, None)


async def test_null_means_the_default(client: httpx.AsyncClient, engine: FakeEngine) -> None:
    names = ("temperature", "top_p", "seed", "stop", "max_tokens", "logit_bias", "logprobs", "n", "tools", "stream")
    assert (await client.post(URL, json=body(**dict.fromkeys(names)))).status_code == 200
    params = engine.seen[0][2]
    assert (params.temperature, params.max_tokens, params.stop) == (1.0, None, ())


async def test_developer_is_system_and_text_parts_are_joined(client: httpx.AsyncClient, engine: FakeEngine) -> None:
    messages = [
        {"role": "developer", "content": "be brief"},
        {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]},
        {"role": "assistant", "content": None, "refusal": None, "audio": None},
        {"role": "user", "content": "", "name": "eve"},
    ]
    assert (await client.post(URL, json={"messages": messages})).status_code == 200
    assert engine.messages == [
        {"role": "system", "content": "be brief"},
        {"role": "user", "content": "a\nb"},
        {"role": "assistant", "content": ""},
        {"role": "user", "content": "", "name": "eve"},
    ]


async def test_the_answer_has_the_name_that_was_asked_for(client: httpx.AsyncClient) -> None:
    assert (await client.post(URL, json=body(model="org/alias"))).json()["model"] == "org/alias"
    assert (await client.post(URL, json={"messages": HELLO})).json()["model"] == "fake"


async def test_fields_without_effect_are_accepted(client: httpx.AsyncClient) -> None:
    fields = {
        "user": "u",
        "metadata": {"a": "b"},
        "store": False,
        "service_tier": "auto",
        "prompt_cache_key": "k",
        "safety_identifier": "s",
        "parallel_tool_calls": True,
        "tools": [],
        "tool_choice": "auto",
        "response_format": {"type": "text"},
        "modalities": ["text"],
        "n": 1,
    }
    assert (await client.post(URL, json=body(**fields))).status_code == 200


async def test_the_unprefixed_alias_answers_too(client: httpx.AsyncClient) -> None:
    assert (await client.post("/chat/completions", json=body())).status_code == 200


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("refusal", "status", "code"),
    [
        (InvalidRequest("This model's maximum...", code="context_length_exceeded"), 400, "context_length_exceeded"),
        (EngineOverloaded("queue is full", retry_after_s=2.5), 503, "overloaded"),
        (EngineDead("it died reading /var/lib/x/y.bin"), 503, "engine_unavailable"),
        (RuntimeError("secret /root/inside"), 500, "internal_error"),
    ],
)
async def test_a_refusal_by_the_engine_is_a_plain_http_error(
    client: httpx.AsyncClient, engine: FakeEngine, refusal: Exception, status: int, code: str, stream: bool
) -> None:
    engine.script = Script(refusal=refusal)
    response = await client.post(URL, json=body(stream=stream))
    assert response.status_code == status
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["code"] == code
    assert "/var" not in error["message"]
    assert "/root" not in error["message"]
    assert response.headers.get("retry-after") == ("3" if code == "overloaded" else "1" if status == 503 else None)
    assert engine.num_open == 0


@pytest.mark.parametrize("path", [URL, "/v1/completions", "/completions", "/chat/completions"])
async def test_a_full_queue_refuses_before_it_looks_at_a_body(
    client: httpx.AsyncClient, engine: FakeEngine, path: str
) -> None:
    engine.full = EngineOverloaded("the queue is full")
    response = await client.post(path, content=b"{ not json")
    assert response.status_code == 503
    assert response.json()["error"]["code"] == "overloaded"
    assert "retry-after" in response.headers
    metrics = (await client.get("/metrics")).text
    assert re.search(r'foregate_admission_rejections_total\{[^}]*reason="queue_full"\} 1.0', metrics)
    assert re.search(rf'foregate_requests_total\{{[^}}]*code="503",endpoint="{path}"[^}}]*\}} 1.0', metrics)
    tokenized = await client.post("/tokenize", json={"prompt": "a"})  # needs no place in the queue
    assert tokenized.status_code == 200


async def test_a_prompt_longer_than_the_context_says_the_limit(client: httpx.AsyncClient) -> None:
    response = await client.post(URL, json=body(messages=[{"role": "user", "content": "x" * 100}]))
    assert response.status_code == 400
    assert response.json()["error"]["message"].startswith("This model's maximum context length is 64 tokens.")
    assert response.json()["error"]["code"] == "context_length_exceeded"


async def test_a_failing_request_is_500_with_the_engines_words(client: httpx.AsyncClient, engine: FakeEngine) -> None:
    engine.script = Script(finish_reason="error", error="record layers.3.experts.5 is corrupt in /data/m/e.bin")
    response = await client.post(URL, json=body())
    assert response.status_code == 500
    assert response.json()["error"]["message"] == "record layers.3.experts.5 is corrupt in <path>"
    assert response.json()["error"]["type"] == "server_error"


@pytest.mark.parametrize(
    "script",
    [
        Script(finish_reason="error", error="record is corrupt"),
        Script(failure=EngineDead("gone")),
        Script(failure=RuntimeError("bug")),
        Script(finish_reason="abort"),
    ],
)
async def test_a_failure_within_a_stream_is_an_event_and_then_done(
    client: httpx.AsyncClient, engine: FakeEngine, script: Script
) -> None:
    engine.script = script
    response = await client.post(URL, json=body(stream=True))
    assert response.status_code == 200
    chunks = events(response)
    assert chunks[1]["choices"][0]["delta"]["content"] == "Par"
    assert set(chunks[-1]["error"]) == {"message", "type", "param", "code"}
    assert engine.num_open == 0


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("n", [1, 2])
async def test_a_grammar_that_becomes_too_complex_is_the_requests_own_error(
    client: httpx.AsyncClient, engine: FakeEngine, stream: bool, n: int
) -> None:
    error = InvalidRequest("regex: too complex", param="structured_outputs.regex", code="grammar_too_complex")
    engine.script = Script(finish_reason="error", error=error)
    asked = body(structured_outputs={"regex": "a+"}, stream=stream, n=n)
    response = await client.post(URL, json=asked)
    assert response.status_code == (200 if stream else 400)
    told = events(response)[-1] if stream else response.json()
    assert told["error"] == {
        "message": "regex: too complex",
        "type": "invalid_request_error",
        "param": "structured_outputs.regex",
        "code": "grammar_too_complex",
    }
    assert response.text.endswith("data: [DONE]\n\n") == stream
    assert '"finish_reason":"stop"' not in response.text  # half an answer is never told as a whole one
    metrics = (await client.get("/metrics")).text
    counted = 'finish_reason="error"' if stream else 'code="400"'
    assert re.search(rf"^foregate_requests_total\{{.*{counted}.*\}} 1\.0$", metrics, re.MULTILINE)
    assert 'code="500"' not in metrics


async def test_a_template_that_fails_names_the_messages(client: httpx.AsyncClient) -> None:
    response = await client.post(URL, json=body(messages=[{"role": "user", "content": "\x00"}]))
    assert response.status_code == 400
    assert response.json()["error"]["param"] == "messages"


@pytest.fixture
async def sdk(connect: Callable[..., httpx.AsyncClient]) -> openai.AsyncOpenAI:
    return openai.AsyncOpenAI(
        api_key="k", base_url="http://test/v1", http_client=connect(), max_retries=0, timeout=10.0
    )


async def test_the_openai_client_reads_both_ways_of_answering(sdk: openai.AsyncOpenAI) -> None:
    whole = await sdk.chat.completions.create(
        model="fake", messages=[{"role": "user", "content": "hi"}], logprobs=True, top_logprobs=1
    )
    assert whole.choices[0].message.content == "Paris."
    assert whole.choices[0].logprobs is not None
    assert whole.usage is not None
    assert whole.usage.prompt_tokens_details is not None
    stream = await sdk.chat.completions.create(
        model="fake",
        messages=[{"role": "user", "content": "hi"}],
        stream=True,
        stream_options={"include_usage": True},
    )
    chunks = [chunk async for chunk in stream]
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert text == "Paris."
    assert chunks[-1].usage is not None
    assert chunks[-1].usage.completion_tokens == 3


async def test_the_openai_client_raises_its_own_errors(sdk: openai.AsyncOpenAI, engine: FakeEngine) -> None:
    with pytest.raises(openai.NotFoundError) as missing:
        await sdk.chat.completions.create(model="nobody", messages=[{"role": "user", "content": "hi"}])
    assert missing.value.code == "model_not_found"
    engine.script = Script(finish_reason="error", error="broken")
    stream = await sdk.chat.completions.create(model="fake", messages=[{"role": "user", "content": "hi"}], stream=True)
    with pytest.raises(openai.APIError, match="broken"):
        async for _ in stream:
            pass
