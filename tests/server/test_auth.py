"""server/auth.py."""

from __future__ import annotations

from collections.abc import Callable

import httpx
import pytest

from engine.errors import EngineOverloaded
from server.auth import hash_key
from tests.server.fake_engine import FakeEngine


@pytest.fixture
def locked(connect: Callable[..., httpx.AsyncClient]) -> httpx.AsyncClient:
    return connect(api_key_hashes=(hash_key("one"), hash_key("two")))


@pytest.mark.parametrize("value", ["", "Bearer", "Bearer ", "Bearer three", "one", "Basic one", "Bearer oné"])
async def test_a_wrong_or_missing_key_is_401(locked: httpx.AsyncClient, value: str) -> None:
    response = await locked.get("/v1/models", headers={"authorization": value.encode()} if value else {})
    assert response.status_code == 401
    assert response.json()["error"]["code"] == "invalid_api_key"
    assert response.headers["www-authenticate"] == "Bearer"


@pytest.mark.parametrize("value", ["Bearer one", "Bearer two", "bearer  one"])
async def test_any_of_the_keys_opens(locked: httpx.AsyncClient, value: str) -> None:
    assert (await locked.get("/v1/models", headers={"authorization": value})).status_code == 200


async def test_only_the_probes_are_open(locked: httpx.AsyncClient) -> None:
    for path in ("/health", "/ready", "/live"):
        assert (await locked.get(path)).status_code == 200
    for path in ("/metrics", "/version", "/openapi.json", "/v1/models", "/nowhere", "/health/"):
        assert (await locked.get(path)).status_code == 401
    assert (await locked.post("/v1/chat/completions", content=b"{")).status_code == 401


async def test_who_has_no_key_does_not_learn_that_the_queue_is_full(
    locked: httpx.AsyncClient, engine: FakeEngine
) -> None:
    engine.full = EngineOverloaded("the queue is full")
    assert (await locked.post("/v1/completions", content=b"{")).status_code == 401
    opened = await locked.post("/v1/completions", content=b"{", headers={"authorization": "Bearer one"})
    assert opened.status_code == 503


async def test_metrics_can_be_open_too(connect: Callable[..., httpx.AsyncClient]) -> None:
    client = connect(api_key_hashes=(hash_key("one"),), open_metrics=True)
    assert (await client.get("/metrics")).status_code == 200
    assert (await client.get("/version")).status_code == 401


def test_keys_are_kept_as_hashes() -> None:
    assert len(hash_key("one")) == 32
    assert b"one" not in hash_key("one")
