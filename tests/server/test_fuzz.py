"""Whatever a body says, the answer is an answer or a 4xx that says why."""

from __future__ import annotations

import json
import random
from typing import Any

import httpx
import pytest

from server.protocol.chat import ChatRequest
from server.protocol.completions import CompletionRequest
from server.protocol.refusals import NOT_HONOURED

FIELDS = sorted({*ChatRequest.model_fields, *CompletionRequest.model_fields, *NOT_HONOURED})
ATOMS: list[Any] = [
    *(None, True, False, 0, 1, -1, 2, 16, 10**30, -(2**63), 0.5, -0.0, 1e308, float("nan"), float("inf")),
    *("", "hi", "fake", "\x00", "\U0001f600", "é" * 50, "text", "user", "1", [], {}),
]


BASES: dict[str, dict[str, Any]] = {
    "/v1/chat/completions": {"messages": [{"role": "user", "content": "hi"}]},
    "/v1/completions": {"prompt": "hi"},
    "/tokenize": {"prompt": "hi"},
    "/detokenize": {"tokens": [104]},
}


def anything(rng: random.Random, depth: int = 0) -> Any:
    kind = rng.random()
    if depth > 2 or kind < 0.6:
        return rng.choice(ATOMS)
    if kind < 0.8:
        return [anything(rng, depth + 1) for _ in range(rng.randrange(4))]
    keys = ("role", "content", "type", "text", "include_usage", "1", "x")
    return {rng.choice(keys): anything(rng, depth + 1) for _ in range(rng.randrange(4))}


@pytest.mark.parametrize("path", BASES)
async def test_no_body_makes_a_5xx(client: httpx.AsyncClient, path: str) -> None:
    rng = random.Random(path)
    statuses = set()
    for _ in range(250):
        body = dict(BASES[path])
        body.update({rng.choice(FIELDS): anything(rng) for _ in range(rng.randrange(1, 3))})
        response = await client.post(path, content=json.dumps(body), headers={"content-type": "application/json"})
        statuses.add(response.status_code)
        assert response.status_code in (200, 400, 404), (body, response.text)
        if response.status_code != 200:
            assert set(response.json()["error"]) == {"message", "type", "param", "code"}
    assert {200, 400} <= statuses
