"""server/routes/health.py: honest whatever the engine's state, and what the API says meanwhile."""

from __future__ import annotations

from collections.abc import Callable

import httpx
import pytest

from engine.messages import EngineState, EngineStats
from server.app import create_app
from server.context import Lifecycle
from server.settings import AppSettings
from tests.server.fake_engine import FakeEngine


@pytest.mark.parametrize(
    ("state", "ready", "live"),
    [
        ("ready", 200, 200),
        ("loading", 503, 200),
        ("stopped", 503, 200),
        ("draining", 503, 200),
        ("restarting", 503, 200),
        ("dead", 503, 503),
    ],
)
async def test_only_a_ready_engine_is_healthy_and_only_a_dead_one_is_not_alive(
    client: httpx.AsyncClient, engine: FakeEngine, state: EngineState, ready: int, live: int
) -> None:
    engine.state = state
    for path, status in (("/health", ready), ("/ready", ready), ("/live", live)):
        response = await client.get(path)
        assert response.status_code == status
        assert response.json() == {"status": "ok" if status == 200 else state}


@pytest.mark.parametrize(
    ("state", "code"),
    [
        ("loading", "loading"),
        ("stopped", "loading"),
        ("draining", "shutting_down"),
        ("restarting", "restarting"),
        ("dead", "engine_unavailable"),
    ],
)
async def test_the_api_is_503_until_the_engine_is_ready(
    client: httpx.AsyncClient, engine: FakeEngine, state: EngineState, code: str
) -> None:
    engine.state = state
    for response in (
        await client.get("/v1/models"),
        await client.post("/v1/chat/completions", json={"messages": [{"role": "user", "content": "hi"}]}),
        await client.post("/v1/completions", json={"prompt": "hi"}),
        await client.post("/tokenize", json={"prompt": "hi"}),
    ):
        assert response.status_code == 503
        assert response.json()["error"]["code"] == code
        assert int(response.headers["retry-after"]) >= 1


async def test_a_server_that_is_going_away_is_not_ready_but_still_serves(engine: FakeEngine) -> None:
    lifecycle = Lifecycle()
    app = create_app(engine, AppSettings(served_names=("fake",)), lifecycle=lifecycle)
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://test", trust_env=False) as client:
        lifecycle.draining = True
        assert (await client.get("/ready")).json() == {"status": "draining"}
        assert (await client.get("/live")).status_code == 200
        assert (await client.post("/v1/completions", json={"prompt": "hi"})).status_code == 200


async def test_an_engine_with_work_that_makes_no_step_is_not_alive(
    connect: Callable[..., httpx.AsyncClient], engine: FakeEngine
) -> None:
    client = connect(stall_timeout_s=10.0)
    for age_s, status, body in ((9.9, 200, "ok"), (10.1, 503, "stalled")):
        engine.stats_to_tell = EngineStats(state="ready", last_step_age_s=age_s)
        for path in ("/live", "/health", "/ready"):
            response = await client.get(path)
            assert (response.status_code, response.json()) == (status, {"status": body})


async def test_the_version_is_told(client: httpx.AsyncClient) -> None:
    assert (await client.get("/version")).json()["version"].startswith("0.")


async def test_a_sane_request_id_is_given_back_and_another_is_replaced(client: httpx.AsyncClient) -> None:
    assert (await client.get("/live", headers={"x-request-id": "abc-1"})).headers["x-request-id"] == "abc-1"
    for odd in ("a b", "x" * 200, ""):
        given = (await client.get("/live", headers={"x-request-id": odd})).headers["x-request-id"]
        assert given.startswith("req-")
