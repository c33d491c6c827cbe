"""server/sse.py and server/generation.py: what happens when a client goes away or nothing happens at all."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import pytest

from server.app import create_app
from server.settings import AppSettings
from tests.server.fake_engine import FakeEngine, Script, Token


class RawClient:
    """An ASGI client that sees each message as it is sent and can hang up."""

    def __init__(self, engine: FakeEngine, **settings: Any) -> None:
        self.app = create_app(engine, AppSettings(served_names=("fake",), **settings))
        self.messages: asyncio.Queue[Any] = asyncio.Queue()
        self._gone = asyncio.Event()

    def post(self, path: str, body: dict[str, Any]) -> asyncio.Task[None]:
        content = json.dumps(body).encode()
        requests = [{"type": "http.request", "body": content, "more_body": False}]

        async def receive() -> Any:
            if requests:
                return requests.pop()
            await self._gone.wait()
            return {"type": "http.disconnect"}

        scope = {
            "type": "http",
            "asgi": {"version": "3.0", "spec_version": "2.3"},
            "http_version": "1.1",
            "method": "POST",
            "scheme": "http",
            "path": path,
            "raw_path": path.encode(),
            "query_string": b"",
            "root_path": "",
            "headers": [(b"content-type", b"application/json"), (b"host", b"localhost")],
            "client": ("127.0.0.1", 1),
            "server": ("test", 80),
        }
        return asyncio.ensure_future(self.app(scope, receive, self.messages.put))

    def hang_up(self) -> None:
        self._gone.set()


async def eventually(condition: Any) -> None:
    for _ in range(200):
        if condition():
            return
        await asyncio.sleep(0.005)
    raise AssertionError("it did not happen within a second")


async def scrape(client: RawClient) -> str:
    import httpx

    async with httpx.AsyncClient(
        transport=httpx.ASGITransport(client.app), base_url="http://test", trust_env=False
    ) as http:
        return (await http.get("/metrics")).text


CHAT = {"messages": [{"role": "user", "content": "hi"}]}
MANY = {"prompt": [[1], [2], [3]]}


@pytest.mark.parametrize(("path", "body"), [("/v1/chat/completions", CHAT), ("/v1/completions", MANY)])
@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("first_delay_s", [0.0, 30.0])
async def test_a_client_that_leaves_ends_its_requests_at_once(
    path: str, body: dict[str, Any], stream: bool, first_delay_s: float
) -> None:
    engine = FakeEngine(Script([Token("a", delay_s=first_delay_s), Token("b", delay_s=30.0)]))
    client = RawClient(engine)
    request = client.post(path, {**body, "stream": stream})
    await eventually(lambda: engine.num_open)
    await asyncio.sleep(0.02)
    client.hang_up()
    await asyncio.wait_for(request, 1.0)
    assert engine.num_open == 0
    assert engine.num_aborted == len(engine.seen)
    metrics = await scrape(client)
    assert (
        f'code="499",endpoint="{path}",engine="0",finish_reason="",model_name="fake",stream="{str(stream).lower()}"'
        in metrics
    )


async def test_a_cancelled_stream_ends_its_request() -> None:
    engine = FakeEngine(Script([Token("a"), Token("b", delay_s=30.0)]))
    client = RawClient(engine)
    request = client.post("/v1/chat/completions", {**CHAT, "stream": True})
    await eventually(lambda: client.messages.qsize() >= 2)
    request.cancel()
    with pytest.raises(asyncio.CancelledError):
        await request
    assert engine.num_open == 0


async def test_nothing_is_sent_before_the_engine_has_answered() -> None:
    engine = FakeEngine(Script([Token("a", delay_s=0.1)]))
    client = RawClient(engine)
    request = client.post("/v1/chat/completions", {**CHAT, "stream": True})
    await eventually(lambda: engine.num_open)
    await asyncio.sleep(0.02)
    assert client.messages.empty()
    await request
    assert client.messages.get_nowait()["type"] == "http.response.start"


async def test_a_comment_is_sent_in_silence_only() -> None:
    engine = FakeEngine(Script([Token("a"), Token("b", delay_s=0.25), Token("c")]))
    client = RawClient(engine, heartbeat_s=0.1)
    await client.post("/v1/chat/completions", {**CHAT, "stream": True})
    bodies = [client.messages.get_nowait().get("body", b"") for _ in range(client.messages.qsize())]
    assert bodies.count(b": keep-alive\n\n") == 2
    assert bodies[-2].endswith(b"data: [DONE]\n\n")
    assert bodies[-1] == b""


async def test_a_send_that_fails_ends_the_request() -> None:
    engine = FakeEngine(Script([Token("a"), Token("b", delay_s=0.01), Token("c", delay_s=30.0)]))
    client = RawClient(engine)

    class Broken(asyncio.Queue[Any]):
        async def put(self, message: Any) -> None:
            if message["type"] == "http.response.body":
                raise OSError("broken pipe")

    client.messages = Broken()
    await asyncio.wait_for(client.post("/v1/chat/completions", {**CHAT, "stream": True}), 1.0)
    assert engine.num_open == 0
