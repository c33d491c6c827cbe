"""server/routes/admin.py: who may record, what is refused, what is sent, and what happens when nobody waits."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import httpx
import pytest

from engine.errors import EngineDead, InvalidRequest
from engine.messages import MAX_TRACE_TOKENS, EngineStats, TraceRecorded
from server.app import create_app
from server.auth import hash_key
from server.context import Lifecycle
from server.settings import AppSettings
from tests.server.fake_engine import FakeEngine
from tests.server.test_sse import RawClient, eventually

URL = "http://127.0.0.1:8000/admin/trace"  # the transport's client is 127.0.0.1 too
SHORT = {"seconds": 0.01}


async def test_the_answer_is_the_recording_and_says_what_is_in_it(client: httpx.AsyncClient, engine: FakeEngine):
    engine.recorded = TraceRecorded(trace_id="t", npz=b"PK\0\xff", num_tokens=7, num_requests=2, is_full=True)
    response = await client.post(URL, json={**SHORT, "max_tokens": 9, "domain": "chat"})
    assert (response.status_code, response.content) == (200, b"PK\0\xff")
    assert response.headers["content-type"] == "application/octet-stream"
    told = [response.headers[f"x-foregate-{name}"] for name in ("tokens", "requests", "full")]
    assert told == ["7", "2", "true"]
    await client.post(URL, json=SHORT)
    assert engine.recordings == [(0.01, 9, "chat"), (0.01, MAX_TRACE_TOKENS, "")]


async def test_deleting_it_ends_a_recording_which_is_answered(client: httpx.AsyncClient, engine: FakeEngine):
    recording = asyncio.ensure_future(client.post(URL, json={"seconds": 60}))
    await eventually(lambda: engine.trace_ends is not None)
    assert (await client.delete(URL)).json() == {"ended": True}
    assert (await recording).headers["x-foregate-tokens"] == "7"
    response = await client.delete(URL)
    assert (response.status_code, response.json()["error"]["code"]) == (404, "not_recording")


async def test_a_second_recording_at_the_same_time_is_409(client: httpx.AsyncClient, engine: FakeEngine):
    recording = asyncio.ensure_future(client.post(URL, json={"seconds": 60}))
    await eventually(lambda: engine.trace_ends is not None)
    response = await client.post(URL, json=SHORT)
    assert response.status_code == 409
    error = response.json()["error"]
    assert (error["type"], error["param"], error["code"]) == ("invalid_request_error", None, "recording_in_progress")
    await client.delete(URL)
    assert (await recording).status_code == 200


async def test_a_client_that_goes_away_ends_the_recording(engine: FakeEngine):
    client = RawClient(engine)
    task = client.post("/admin/trace", {"seconds": 60})
    await eventually(lambda: engine.trace_ends is not None)
    client.hang_up()
    await asyncio.wait_for(task, 5.0)
    assert engine.trace_ends is None
    assert client.messages.empty()


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"seconds": 0}, "seconds"),
        ({"seconds": 3601}, "seconds"),
        ({"seconds": "60"}, "seconds"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_tokens": MAX_TRACE_TOKENS + 1}, "max_tokens"),
        ({"domain": "x" * 101}, "domain"),
    ],
)
async def test_what_is_out_of_bounds_is_400(client: httpx.AsyncClient, body: dict[str, Any], param: str):
    response = await client.post(URL, json=body)
    assert (response.status_code, response.json()["error"]["param"]) == (400, param)


@pytest.mark.parametrize(
    ("error", "status"), [(InvalidRequest("no experts", param="model"), 400), (EngineDead("it failed"), 503)]
)
async def test_what_the_engine_refuses_is_an_error_object(
    client: httpx.AsyncClient, engine: FakeEngine, monkeypatch: pytest.MonkeyPatch, error: Exception, status: int
):
    async def refuse(**_: Any) -> TraceRecorded:
        raise error

    monkeypatch.setattr(engine, "record_trace", refuse)
    response = await client.post(URL, json=SHORT)
    assert (response.status_code, response.json()["error"]["message"]) == (status, str(error))


async def test_while_the_model_loads_there_is_nothing_to_record(client: httpx.AsyncClient, engine: FakeEngine):
    engine.state = "loading"
    assert (await client.post(URL, json=SHORT)).status_code == 503


async def test_with_api_keys_one_is_needed_from_wherever(connect: Callable[..., httpx.AsyncClient]):
    client = connect(api_key_hashes=(hash_key("one"),))
    for method in ("POST", "DELETE"):
        assert (await client.request(method, URL)).status_code == 401
    headers = {"authorization": "Bearer one", "x-forwarded-for": "192.0.2.1"}
    response = await client.post("http://models.example/admin/trace", json=SHORT, headers=headers)
    assert response.status_code == 200


@pytest.mark.parametrize("host", ["127.0.0.1", "[::1]", "localhost"])
async def test_without_a_key_a_request_of_this_machine_will_do(client: httpx.AsyncClient, host: str):
    assert (await client.post(f"http://{host}:8000/admin/trace", json=SHORT)).status_code == 200


@pytest.mark.parametrize(
    ("address", "url", "headers"),
    [
        ("192.0.2.1", URL, {}),
        ("::ffff:192.0.2.1", URL, {}),
        ("", URL, {}),
        ("127.0.0.1", "http://rebound.example/admin/trace", {}),
        ("127.0.0.1", URL, {"host": "[nonsense"}),
        ("127.0.0.1", URL, {"host": "re_bound.example"}),
        ("127.0.0.1", URL, {"host": ""}),
        ("127.0.0.1", URL, {"x-forwarded-for": "127.0.0.1"}),
        ("127.0.0.1", URL, {"forwarded": "for=192.0.2.1"}),
    ],
)
async def test_without_a_key_any_other_is_403(engine: FakeEngine, address: str, url: str, headers: dict[str, str]):
    app = create_app(engine, AppSettings(served_names=("fake",)))
    transport = httpx.ASGITransport(app, client=(address, 1))
    async with httpx.AsyncClient(transport=transport, trust_env=False) as client:
        for method in ("POST", "DELETE"):
            response = await client.request(method, url, headers=headers, json=SHORT)
            assert (response.status_code, response.json()["error"]["code"]) == (403, "admin_needs_api_key")
    assert not engine.recordings


async def test_integrity_tells_what_does_not_add_up(client: httpx.AsyncClient, engine: FakeEngine):
    url = URL.replace("trace", "integrity")
    assert (await client.get(url)).json() == {"ok": True, "error": None, "num_requests": 0}
    engine.integrity = "a block is lost"
    engine.stats_to_tell = EngineStats(state="ready", num_running=2, num_waiting=3)
    assert (await client.get(url)).json() == {"ok": False, "error": "a block is lost", "num_requests": 5}
    assert (await client.get(url, headers={"x-forwarded-for": "10.0.0.1"})).status_code == 403


async def test_a_drained_server_refuses_what_is_new_until_it_is_put_back(client: httpx.AsyncClient, engine: FakeEngine):
    url = URL.replace("trace", "drain")
    engine.stats_to_tell = EngineStats(state="ready", num_running=2, num_waiting=1)
    assert (await client.post(url)).json() == {"draining": True, "num_requests": 3}
    assert (await client.get("/ready")).json() == {"status": "draining"}
    assert (await client.get("/live")).status_code == 200
    refused = await client.post("/v1/completions", json={"prompt": "hi"})
    assert (refused.status_code, refused.json()["error"]["code"]) == (503, "shutting_down")
    assert (await client.delete(url)).json() == {"draining": False, "num_requests": 3}
    assert (await client.get("/ready")).status_code == 200
    assert (await client.post("/v1/completions", json={"prompt": "hi"})).status_code == 200
    for method in ("POST", "DELETE"):
        assert (await client.request(method, url, headers={"x-forwarded-for": "10.0.0.1"})).status_code == 403


async def test_a_server_that_ends_is_not_put_back(engine: FakeEngine):
    lifecycle = Lifecycle()
    lifecycle.draining = lifecycle.stopping = True
    transport = httpx.ASGITransport(create_app(engine, AppSettings(served_names=("fake",)), lifecycle=lifecycle))
    async with httpx.AsyncClient(transport=transport, trust_env=False) as client:
        assert (await client.delete(URL.replace("trace", "drain"))).status_code == 409
    assert lifecycle.draining
