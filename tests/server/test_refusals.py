"""The door: what is not honoured is refused by name, what is malformed is a clear 400, and nothing is ignored."""

from __future__ import annotations

import asyncio
import json
import logging
import re
import threading
from collections.abc import Callable
from typing import Any

import httpx
import msgspec
import pytest

import server.body
from tests.server.fake_engine import FakeEngine

CHAT = "/v1/chat/completions"
HELLO = [{"role": "user", "content": "hi"}]


async def refused(client: httpx.AsyncClient, body: dict[str, Any], url: str = CHAT) -> dict[str, Any]:
    base: dict[str, Any] = {"messages": HELLO} if url == CHAT else {"prompt": "hi"}
    response = await client.post(
        url, content=json.dumps({**base, **body}), headers={"content-type": "application/json"}
    )
    assert response.status_code == 400, response.text
    error: dict[str, Any] = response.json()["error"]
    assert error["type"] == "invalid_request_error"
    return error


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("n", 0),
        ("n", 129),
        ("n", "1"),
        ("n", True),
        ("tool_choice", "required"),
        ("tool_choice", {"type": "function", "function": {"name": "f"}}),
        ("functions", [{}]),
        ("modalities", ["text", "audio"]),
        ("audio", {"voice": "x"}),
        ("guided_json", {}),
        ("guided_regex", "a"),
        ("guided_choice", ["a"]),
        ("guided_grammar", "a"),
        ("prompt_logprobs", 0),
        ("reasoning_effort", "low"),
        ("chat_template", "{{ 1 }}"),
        ("chat_template_kwargs", {"enable_thinking": False}),
        ("continue_final_message", True),
        ("echo", True),
        ("use_beam_search", True),
        ("web_search_options", {}),
        ("include_stop_str_in_output", True),
    ],
)
async def test_what_chat_does_not_honour_is_refused_by_name(
    client: httpx.AsyncClient, engine: FakeEngine, name: str, value: Any
) -> None:
    error = await refused(client, {name: value})
    assert error["param"] == name
    assert name in error["message"]
    assert engine.seen == []


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("n", 0),
        ("n", 129),
        ("best_of", 2),
        ("echo", "yes"),
        ("max_tokens", -1),
        ("suffix", "end"),
        ("prompt_logprobs", 1),
        ("add_special_tokens", False),
    ],
)
async def test_what_completions_do_not_honour_is_refused_by_name(
    client: httpx.AsyncClient, name: str, value: Any
) -> None:
    assert (await refused(client, {name: value}, "/v1/completions"))["param"] == name


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("temperature", "hot"),
        ("temperature", 2.1),
        ("temperature", -0.1),
        ("temperature", True),
        ("temperature", float("nan")),
        ("temperature", float("inf")),
        ("top_p", 0),
        ("top_p", 1.5),
        ("top_k", -2),
        ("top_k", 1.5),
        ("min_p", 2),
        ("max_tokens", 0),
        ("max_tokens", -1),
        ("max_tokens", "5"),
        ("max_tokens", True),
        ("max_tokens", 5.5),
        ("max_tokens", 10**30),
        ("max_completion_tokens", 0),
        ("min_tokens", -1),
        ("seed", "x"),
        ("seed", 2**63),
        ("frequency_penalty", 3),
        ("presence_penalty", -3),
        ("repetition_penalty", 0),
        ("repetition_penalty", 1e-320),
        ("logit_bias", {"x": 1}),
        ("logit_bias", {"-1": 1}),
        ("logit_bias", {"99999999": 1}),
        ("logit_bias", {"1": 101}),
        ("logit_bias", {"1": float("nan")}),
        ("logit_bias", []),
        ("stop", ["a"] * 5),
        ("stop", ""),
        ("stop", [1]),
        ("stop", 1),
        ("stop_token_ids", [-1]),
        ("stop_token_ids", [256]),
        ("stop_token_ids", ["1"]),
        ("logprobs", 1),
        ("top_logprobs", 21),
        ("top_logprobs", 1),
        ("stream", "yes"),
        ("stream_options", {"include_usage": True}),
        ("ignore_eos", 1),
        ("model", 5),
    ],
)
async def test_a_bad_value_is_refused_by_name(client: httpx.AsyncClient, name: str, value: Any) -> None:
    error = await refused(client, {name: value})
    assert re.split(r"[.\[]", error["param"] or "")[0] == name


async def test_stream_options_that_are_not_known_are_refused(client: httpx.AsyncClient) -> None:
    error = await refused(client, {"stream": True, "stream_options": {"continuous_usage_stats": True}})
    assert error["param"] == "stream_options.continuous_usage_stats"


async def test_min_tokens_above_max_tokens_is_refused(client: httpx.AsyncClient) -> None:
    assert (await refused(client, {"min_tokens": 5, "max_tokens": 4}))["param"] == "min_tokens"


async def test_the_flag_allows_more_stop_strings(connect: Callable[..., httpx.AsyncClient]) -> None:
    client = connect(max_stop_strings=16)
    assert (await client.post(CHAT, json={"messages": HELLO, "stop": ["a"] * 16})).status_code == 200
    assert (await client.post(CHAT, json={"messages": HELLO, "stop": ["a"] * 17})).status_code == 400


@pytest.mark.parametrize(
    ("messages", "param"),
    [
        ([], "messages"),
        (None, "messages"),
        ("hi", "messages"),
        ([{}], "messages[0].role"),
        (["hi"], "messages[0]"),
        ([{"role": "robot", "content": "x"}], "messages[0].role"),
        ([{"role": "tool", "content": "x"}], "messages[0]"),
        ([{"role": "function", "content": "x", "name": "f"}], "messages[0].role"),
        (
            [{"role": "user", "content": "x", "tool_calls": [{"id": "1", "function": {"name": "f", "arguments": ""}}]}],
            "messages[0]",
        ),
        ([*HELLO, {"role": "user"}], "messages[1]"),
        ([*HELLO, {"role": "user", "content": None}], "messages[1]"),
        ([{"role": "user", "content": 5}], "messages[0].content"),
        ([{"role": "user", "content": ["hi"]}], "messages[0].content"),
        ([{"role": "user", "content": [{"type": "text"}]}], "messages[0].content"),
        ([{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}], "messages[0].content"),
        ([{"role": "assistant", "content": None, "tool_calls": [{}]}], "messages[0].tool_calls[0].id"),
    ],
)
async def test_bad_messages_are_refused_at_their_place(client: httpx.AsyncClient, messages: Any, param: str) -> None:
    assert (await refused(client, {"messages": messages}))["param"] == param


async def test_a_body_without_messages_names_them(client: httpx.AsyncClient) -> None:
    response = await client.post(CHAT, json={"model": "fake"})
    assert response.status_code == 400
    assert response.json()["error"]["param"] == "messages"


@pytest.mark.parametrize("url", [CHAT, "/v1/completions"])
async def test_an_unknown_model_is_404(client: httpx.AsyncClient, url: str) -> None:
    response = await client.post(url, json={"model": "gpt-9", "messages": HELLO, "prompt": "hi"})
    assert response.status_code == 404
    error = response.json()["error"]
    assert (error["code"], error["param"], error["type"]) == ("model_not_found", "model", "invalid_request_error")


async def test_any_model_name_is_answered_where_that_is_configured(connect: Callable[..., httpx.AsyncClient]) -> None:
    response = await connect(accept_any_model_name=True).post(CHAT, json={"model": "gpt-9", "messages": HELLO})
    assert response.json()["model"] == "gpt-9"


@pytest.mark.parametrize(
    "raw",
    [b"", b"{", b"nonsense", b'{"a":1}}', b"[" * 100_000, b'{"messages": "\xff"}', b'{"messages": "\\ud800"}', b"\x00"],
)
async def test_invalid_json_is_400(client: httpx.AsyncClient, raw: bytes) -> None:
    response = await client.post(CHAT, content=raw, headers={"content-type": "application/json"})
    assert response.status_code == 400
    assert response.json()["error"]["code"] == "invalid_json"


@pytest.mark.parametrize("raw", [b"[]", b"null", b"5", b'"x"'])
async def test_json_that_is_no_object_is_400(client: httpx.AsyncClient, raw: bytes) -> None:
    response = await client.post(CHAT, content=raw, headers={"content-type": "application/json"})
    assert response.status_code == 400
    assert response.json()["error"]["message"] == "the body must be a JSON object"


@pytest.mark.parametrize(
    "headers",
    [
        {"content-type": "text/plain"},
        {"content-type": "application/x-www-form-urlencoded"},
        {"content-type": ""},
        {"content-type": "application/json", "content-encoding": "gzip"},
    ],
)
async def test_another_content_type_is_415(client: httpx.AsyncClient, headers: dict[str, str]) -> None:
    response = await client.post(CHAT, content=json.dumps({"messages": HELLO}), headers=headers)
    assert response.status_code == 415
    assert set(response.json()["error"]) == {"message", "type", "param", "code"}


async def test_a_charset_in_the_content_type_is_fine(client: httpx.AsyncClient) -> None:
    headers = {"content-type": "application/json; charset=utf-8"}
    response = await client.post(CHAT, content=json.dumps({"messages": HELLO}), headers=headers)
    assert response.status_code == 200


async def test_a_body_above_the_limit_is_413_declared_or_not(
    connect: Callable[..., httpx.AsyncClient], engine: FakeEngine
) -> None:
    client = connect(max_body_nbytes=1000)
    headers = {"content-type": "application/json"}

    async def parts() -> Any:
        for _ in range(3):
            yield b" " * 500

    for content in (b" " * 1001, parts()):
        response = await client.post(CHAT, content=content, headers=headers)
        assert response.status_code == 413
        assert response.json()["error"]["code"] == "request_too_large"
    assert engine.seen == []


async def test_a_body_with_too_many_values_is_413_and_a_large_text_is_none(
    connect: Callable[..., httpx.AsyncClient], engine: FakeEngine
) -> None:
    client = connect(max_body_values=50_000)
    response = await client.post("/v1/completions", json={"prompt": [12345] * 50_001})
    assert (response.status_code, response.json()["error"]["code"]) == (413, "request_too_large")
    engine.model = msgspec.structs.replace(engine.model, max_model_len=1_000_000)
    for prompt in ("x" * 300_000, [100] * 50_000):
        response = await client.post("/v1/completions", json={"prompt": prompt, "max_tokens": 1})
        assert response.status_code == 200
        assert engine.seen[-1][1] == (list(prompt.encode()) if isinstance(prompt, str) else prompt)


async def test_objects_with_too_many_members_are_413_and_a_text_that_looks_like_them_is_none(
    connect: Callable[..., httpx.AsyncClient], engine: FakeEngine
) -> None:
    client = connect(max_body_members=50_000)
    for member in (b'"a":1', b'"a" :1', b'"a\\\\"\n: 1'):  # a name that ends with a backslash is a name
        content = b'{"messages": [' + b",".join([b"{" + member + b', "b":1}'] * 25_001) + b"]" + b" " * 300_000 + b"}"
        response = await client.post(CHAT, content=content, headers={"content-type": "application/json"})
        assert (response.status_code, response.json()["error"]["code"]) == (413, "request_too_large")
    engine.model = msgspec.structs.replace(engine.model, max_model_len=1_000_000)
    prompt = '{"name\\\\" :1} ' * 60_000  # a member each, were it not a string
    response = await client.post("/v1/completions", json={"prompt": prompt, "max_tokens": 1})
    assert response.status_code == 200
    assert engine.seen[-1][1] == list(prompt.encode())


async def test_what_is_wrong_in_a_large_body_is_named_as_in_a_small_one(client: httpx.AsyncClient) -> None:
    for pad in (1, 300_000):
        response = await client.post(CHAT, json={"messages": HELLO, "temperature": 3, "user": "x" * pad})
        assert (response.status_code, response.json()["error"]["param"]) == (400, "temperature")
        response = await client.post(
            CHAT, content=b'{"a": "' + b"x" * pad, headers={"content-type": "application/json"}
        )
        assert (response.status_code, response.json()["error"]["code"]) == (400, "invalid_json")


async def test_more_messages_than_the_context_has_tokens_are_too_many(client: httpx.AsyncClient) -> None:
    response = await client.post(CHAT, json={"messages": HELLO * 65})
    assert (response.status_code, response.json()["error"]["code"]) == (400, "context_length_exceeded")
    assert response.json()["error"]["message"].startswith("This model's maximum context length is 64 tokens.")


async def test_the_event_loop_goes_on_while_a_large_body_is_parsed(
    client: httpx.AsyncClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    parsing, may_end = threading.Event(), threading.Event()
    parse = server.body._parse

    def slowly(raw: bytes, kind: Any) -> Any:
        parsing.set()
        assert may_end.wait(60)
        return parse(raw, kind)

    monkeypatch.setattr(server.body, "_parse", slowly)
    asked = asyncio.ensure_future(client.post(CHAT, json={"messages": HELLO, "user": "x" * 300_000}))
    while not parsing.is_set():
        await asyncio.sleep(0.001)
    assert (await client.get("/live")).status_code == 200
    assert not asked.done()
    may_end.set()
    assert (await asked).status_code == 200


async def test_an_unknown_field_is_accepted_with_one_warning_for_its_name(
    client: httpx.AsyncClient, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING, logger="foregate.server"):
        for _ in range(3):
            assert (await client.post(CHAT, json={"messages": HELLO, "magic": 1})).status_code == 200
    assert len([record for record in caplog.records if "magic" in record.getMessage()]) == 1


async def test_an_unknown_field_is_400_with_strict_requests(connect: Callable[..., httpx.AsyncClient]) -> None:
    error = await refused(connect(strict_requests=True), {"magic": 1})
    assert (error["param"], error["code"]) == ("magic", "unknown_parameter")


async def test_many_mistakes_make_a_short_answer(client: httpx.AsyncClient) -> None:
    error = await refused(client, {"messages": [{"role": "x" * 100}] * 1000})
    assert len(error["message"]) <= 2000
    assert error["message"].count(";") == 9


async def test_an_unknown_route_and_a_wrong_method_have_the_error_object_too(client: httpx.AsyncClient) -> None:
    for response, status in ((await client.get("/v1/nothing"), 404), (await client.get(CHAT), 405)):
        assert response.status_code == status
        assert set(response.json()["error"]) == {"message", "type", "param", "code"}
        assert response.headers["x-request-id"]
