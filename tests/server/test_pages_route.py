"""server/routes/pages.py and dashboard.py, by their answers; what they look like is for a browser."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import httpx
import pytest

from engine.errors import EngineOverloaded
from server.auth import hash_key
from server.routes.pages import PAGE_PATHS
from tests.server.fake_engine import FakeEngine, Script

Connect = Callable[..., httpx.AsyncClient]


@pytest.mark.parametrize("path", sorted(PAGE_PATHS))
async def test_pages_are_open_and_guarded_and_not_sent_twice(connect: Connect, path: str) -> None:
    client = connect(api_key_hashes=(hash_key("k"),))
    response = await client.get(path)
    assert response.status_code == 200
    assert response.headers["content-security-policy"].startswith("default-src 'self';")
    assert "unsafe-eval" not in response.headers["content-security-policy"]
    assert "script-src" not in response.headers["content-security-policy"]  # default-src says where scripts are from
    assert ("unsafe-inline" in response.headers["content-security-policy"]) == (path == "/docs")  # of Swagger's styles
    assert response.headers["x-content-type-options"] == "nosniff"
    kind = {"js": "text/javascript", "css": "text/css", "svg": "image/svg+xml"}.get(
        path.rsplit(".", 1)[-1], "text/html"
    )
    assert response.headers["content-type"].startswith(kind)
    assert response.headers["content-encoding"] == "gzip"
    plain = await client.get(path, headers={"accept-encoding": "identity"})
    assert "content-encoding" not in plain.headers
    assert plain.content == response.content
    again = await client.get(path, headers={"if-none-match": response.headers["etag"]})
    assert (again.status_code, again.content) == (304, b"")
    assert (await client.head(path)).status_code == 200


async def test_no_other_file_is_served(client: httpx.AsyncClient) -> None:
    for path in ("/static/analysis.html", "/static/..%2fapp.py", "/static/%2e%2e/app.py", "/static/", "/static/no.js"):
        assert (await client.get(path)).status_code == 404


async def test_what_the_dashboard_shows_needs_the_key(connect: Connect) -> None:
    client = connect(api_key_hashes=(hash_key("k"),))
    assert (await client.get("/dashboard/data")).status_code == 401
    assert (await client.get("/dashboard/data", headers={"authorization": "Bearer k"})).status_code == 200


async def test_requests_are_told_without_their_text(client: httpx.AsyncClient, engine: FakeEngine) -> None:
    await client.post("/v1/completions", json={"prompt": "a secret"}, headers={"x-request-id": "mine"})
    chat = {"messages": [{"role": "user", "content": "secret"}], "stream": True}
    await client.post("/v1/chat/completions", json=chat)
    await client.post("/v1/completions", json={"prompt": "x", "temperature": 9})
    engine.script = Script(refusal=EngineOverloaded("the queue is full"))
    assert (await client.post("/v1/completions", json={"prompt": "x"})).status_code == 503
    await client.post("/tokenize", json={"prompt": "x"})
    response = await client.get("/dashboard/data")
    told = response.json()
    assert "secret" not in response.text
    assert "Par" not in response.text
    keys = ("endpoint", "stream", "running", "code", "finish_reason", "output_tokens")
    assert [tuple(line[key] for key in keys) for line in told["requests"]] == [
        ("/v1/completions", False, False, "400", "", 0),
        ("/v1/chat/completions", True, False, "200", "stop", 3),
        ("/v1/completions", False, False, "200", "stop", 3),
    ]
    assert told["turned_away"] == 1
    mine = told["requests"][-1]
    assert (mine["id"], mine["prompt_tokens"]) == ("mine", 8)
    assert 0 <= mine["ttft_s"] <= mine["seconds"] <= mine["age_s"]


async def test_while_the_model_loads_the_state_is_told(client: httpx.AsyncClient, engine: FakeEngine) -> None:
    engine.state = "loading"
    told = (await client.get("/dashboard/data")).json()
    assert told["state"] == "loading"
    assert (await client.post("/v1/completions", json={"prompt": "x"})).status_code == 503
    told = (await client.get("/dashboard/data")).json()
    assert (told["turned_away"], told["requests"]) == (1, [])


async def test_only_new_rows_are_sent(client: httpx.AsyncClient) -> None:
    told: dict[str, Any] = (await client.get("/dashboard/data")).json()
    assert len(told["rows"]) == 1
    assert len(told["rows"][0]) == len(told["columns"])
    last = told["rows"][-1][0]
    assert (await client.get("/dashboard/data", params={"after": last})).json()["rows"] == []
    assert (await client.get("/dashboard/data", params={"after": -1})).status_code in (400, 422)
