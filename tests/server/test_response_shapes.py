"""Answers and chunks beside OpenAI's own schema, as its SDK has it: every required key there, of the right type."""

from __future__ import annotations

import json
from typing import Any

import httpx
import pytest
from openai.types import Completion, Model
from openai.types.chat import ChatCompletion, ChatCompletionChunk
from pydantic import BaseModel

CHAT = {"model": "fake", "messages": [{"role": "user", "content": "hi"}]}
VARIANTS: list[dict[str, Any]] = [
    {},
    {"logprobs": True, "top_logprobs": 2},
    {"max_tokens": 1, "user": "u", "store": False},
]


def complete(kind: type[BaseModel], answer: dict[str, Any]) -> None:
    """Valid, strictly; and no field that the SDK requires is filled in from nowhere."""
    parsed = kind.model_validate_json(json.dumps(answer), strict=True)
    assert not missing(parsed, answer), missing(parsed, answer)


def missing(parsed: Any, sent: Any, at: str = "") -> list[str]:
    if isinstance(parsed, BaseModel):
        lacking = [
            f"{at}.{name}"
            for name, field in type(parsed).model_fields.items()
            if field.is_required() and name not in sent
        ]
        return lacking + [
            one
            for name in type(parsed).model_fields
            if name in sent
            for one in missing(getattr(parsed, name), sent[name], f"{at}.{name}")
        ]
    if isinstance(parsed, list):
        return [
            one
            for i, (item, other) in enumerate(zip(parsed, sent, strict=True))
            for one in missing(item, other, f"{at}[{i}]")
        ]
    return []


def events(response: httpx.Response) -> list[Any]:
    data = [line.removeprefix("data: ") for line in response.text.splitlines() if line.startswith("data: ")]
    assert data[-1] == "[DONE]"
    return [json.loads(text) for text in data[:-1]]


@pytest.mark.parametrize("variant", VARIANTS)
async def test_chats_are_openais(client: httpx.AsyncClient, variant: dict[str, Any]) -> None:
    response = await client.post("/v1/chat/completions", json={**CHAT, **variant})
    answer = response.json()
    complete(ChatCompletion, answer)
    assert answer["choices"][0].keys() >= {"index", "message", "logprobs", "finish_reason"}
    assert answer["choices"][0]["message"].keys() >= {"role", "content", "refusal"}
    assert answer["usage"]["prompt_tokens_details"].keys() >= {"cached_tokens"}
    assert answer["system_fingerprint"]
    assert response.headers["x-request-id"]


@pytest.mark.parametrize("usage", [False, True])
@pytest.mark.parametrize("variant", VARIANTS)
async def test_streamed_chats_are_openais(client: httpx.AsyncClient, variant: dict[str, Any], usage: bool) -> None:
    options = {"stream_options": {"include_usage": True}} if usage else {}
    response = await client.post("/v1/chat/completions", json={**CHAT, **variant, **options, "stream": True})
    assert response.headers["content-type"].startswith("text/event-stream")
    assert (response.headers["cache-control"], response.headers["x-accel-buffering"]) == ("no-cache", "no")
    chunks = events(response)
    for chunk in chunks:
        complete(ChatCompletionChunk, chunk)
    assert len({chunk["id"] for chunk in chunks}) == 1
    assert chunks[0]["choices"][0]["delta"] == {"role": "assistant", "content": ""}
    last = [chunk for chunk in chunks if chunk["choices"]][-1]["choices"][0]
    assert (last["delta"], bool(last["finish_reason"])) == ({}, True)
    assert [chunk["usage"] is None for chunk in chunks if "usage" in chunk] == (
        [True] * (len(chunks) - 1) + [False]
    ) * usage


@pytest.mark.parametrize("variant", [{}, {"logprobs": 1}, {"logprobs": 0, "echo": True}, {"n": 2, "max_tokens": 0}])
async def test_completions_are_openais(client: httpx.AsyncClient, variant: dict[str, Any]) -> None:
    body = {"model": "fake", "prompt": "hi", **variant}
    answer = (await client.post("/v1/completions", json=body)).json()
    if not variant.get("echo"):  # whose first token has a null, as OpenAI's had, though the SDK's type does not say so
        complete(Completion, answer)
        for chunk in events(await client.post("/v1/completions", json={**body, "stream": True})):
            if chunk["choices"] and chunk["choices"][0]["finish_reason"] is not None:
                complete(Completion, chunk)
    assert answer["choices"][0].keys() >= {"index", "text", "logprobs", "finish_reason"}


async def test_models_are_openais(client: httpx.AsyncClient) -> None:
    for card in (await client.get("/v1/models")).json()["data"]:
        complete(Model, card)
        complete(Model, (await client.get(f"/v1/models/{card['id']}")).json())
