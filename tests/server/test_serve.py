"""server/serve.py: a real socket, loading, failing to load, and going away."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import os
import re
import signal
import socket
from collections.abc import AsyncIterator
from typing import Any

import httpx
import pytest

from engine.errors import CheckpointError, ConfigError
from server.app import create_app
from server.context import Lifecycle
from server.serve import Refusals, ShutdownTimes, listen, run, serve
from server.settings import AppSettings
from tests.server.fake_engine import FakeEngine, Script, Token

CHAT = {"messages": [{"role": "user", "content": "hi"}], "stream": True}


class Running:
    def __init__(self, engine: FakeEngine, times: ShutdownTimes) -> None:
        self.lifecycle = Lifecycle()
        app = create_app(engine, AppSettings(served_names=("fake",)), lifecycle=self.lifecycle)
        listener = listen("127.0.0.1", 0)
        self.url = f"http://127.0.0.1:{listener.getsockname()[1]}"
        self.stop: asyncio.Future[int] = asyncio.get_running_loop().create_future()
        self.task = asyncio.ensure_future(
            serve(
                engine,
                app,
                self.lifecycle,
                listener,
                stop=self.stop,
                times=times,
                display=contextlib.nullcontext(),
            )
        )

    async def until(self, client: httpx.AsyncClient, path: str, status: int) -> None:
        for _ in range(200):
            if (await client.get(path)).status_code == status:
                return
            await asyncio.sleep(0.01)
        raise AssertionError(f"{path} did not become {status}")


@contextlib.asynccontextmanager
async def running(engine: FakeEngine, **times: float) -> AsyncIterator[tuple[Running, httpx.AsyncClient]]:
    server = Running(engine, ShutdownTimes(**{"timeout_s": 5.0, "linger_s": 0.0, **times}))
    try:
        async with httpx.AsyncClient(base_url=server.url, trust_env=False) as client:
            yield server, client
    finally:
        if not server.stop.done():
            server.stop.set_result(signal.SIGINT)
        await asyncio.wait({server.task})


async def test_probes_answer_while_the_model_loads(engine: FakeEngine) -> None:
    engine.start_s = 1.0
    async with running(engine) as (server, client):
        assert (await client.get("/live")).status_code == 200
        assert (await client.get("/health")).json() == {"status": "loading"}
        assert (await client.post("/v1/chat/completions", json=CHAT)).status_code == 503
        await server.until(client, "/health", 200)
        assert "Paris" not in (await client.get("/metrics")).text
        assert '"content":"Par"' in (await client.post("/v1/chat/completions", json=CHAT)).text


async def test_how_long_the_start_took_is_told_once_it_is_over_and_the_loop_is_watched(engine: FakeEngine) -> None:
    engine.start_s = 2.0
    async with running(engine) as (server, client):
        assert "foregate_startup_seconds" not in (await client.get("/metrics")).text
        await server.until(client, "/health", 200)
        text = (await client.get("/metrics")).text
        assert float(re.search(r"^foregate_startup_seconds\{.*\} (\S+)$", text, re.MULTILINE)[1]) > 0.3
        assert float(re.search(r"^foregate_event_loop_lag_seconds_count\{.*\} (\S+)$", text, re.MULTILINE)[1]) > 0


async def test_a_model_that_does_not_load_ends_the_server_with_its_error(engine: FakeEngine) -> None:
    engine.start_error = CheckpointError("shard 2 of 3 is missing")
    async with running(engine) as (server, _):
        with pytest.raises(CheckpointError, match="shard 2"):
            await asyncio.wait_for(server.task, 3.0)


async def test_a_stop_while_loading_does_not_wait_for_the_model(engine: FakeEngine) -> None:
    engine.start_s = 60.0
    async with running(engine) as (server, client):
        await client.get("/live")
        server.stop.set_result(signal.SIGTERM)
        assert await asyncio.wait_for(server.task, 3.0) is False


async def test_what_runs_is_finished_before_the_server_goes(engine: FakeEngine) -> None:
    engine.script = Script([Token("a"), Token("b", delay_s=0.5), Token("c")])
    async with running(engine, linger_s=0.2) as (server, client):
        await server.until(client, "/health", 200)
        async with client.stream("POST", "/v1/chat/completions", json=CHAT) as response:
            server.stop.set_result(signal.SIGTERM)
            await server.until(client, "/ready", 503)
            assert (await client.get("/live")).status_code == 200
            text = (await response.aread()).decode()
        assert text.endswith("data: [DONE]\n\n")
        assert '"content":"c"' in text
        assert await asyncio.wait_for(server.task, 3.0) is True
        assert engine.stopped_with == pytest.approx(4.8)
        with pytest.raises(httpx.ConnectError):
            await client.get("/live")


async def test_a_keyboard_interrupt_does_not_linger(engine: FakeEngine) -> None:
    async with running(engine, linger_s=60.0, timeout_s=60.0) as (server, client):
        await server.until(client, "/health", 200)
        server.stop.set_result(signal.SIGINT)
        assert await asyncio.wait_for(server.task, 3.0) is True


async def test_what_runs_too_long_is_cut_at_the_timeout(engine: FakeEngine) -> None:
    engine.script = Script([Token("a"), Token("b", delay_s=60.0)])
    async with running(engine, timeout_s=0.1) as (server, client):
        await server.until(client, "/health", 200)
        async with client.stream("POST", "/v1/chat/completions", json=CHAT) as response:
            server.stop.set_result(signal.SIGTERM)
            with contextlib.suppress(httpx.HTTPError):
                await response.aread()
        await asyncio.wait_for(server.task, 5.0)
    assert engine.num_open == 0


async def test_a_client_that_never_reads_does_not_hold_the_server_up(engine: FakeEngine) -> None:
    engine.script = Script([Token("x" * 200_000) for _ in range(40)])
    async with running(engine, timeout_s=0.5) as (server, client):
        await server.until(client, "/health", 200)
        body = json.dumps({**CHAT, "max_tokens": 40}).encode()
        with socket.create_connection(("127.0.0.1", int(server.url.rsplit(":", 1)[1]))) as mute:
            head = ("POST /v1/chat/completions HTTP/1.1", "Host: x", "Content-Type: application/json")
            mute.sendall("\r\n".join((*head, f"Content-Length: {len(body)}", "", "")).encode() + body)
            while engine.num_open == 0:
                await asyncio.sleep(0.01)
            server.stop.set_result(signal.SIGTERM)
            assert await asyncio.wait_for(server.task, 5.0) is True


def test_a_port_in_use_is_an_error_that_says_so() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        with pytest.raises(ConfigError, match="choose another --port"):
            listen("127.0.0.1", taken.getsockname()[1])


def test_a_host_that_is_not_ours_is_an_error_that_says_so() -> None:
    with pytest.raises(ConfigError, match="choose another"):
        listen("192.0.2.1", 8000)


def test_a_signal_ends_run_and_the_handlers_are_put_back(engine: FakeEngine) -> None:
    before = signal.getsignal(signal.SIGTERM)
    lifecycle = Lifecycle()

    class SignalWhenEntered(contextlib.nullcontext[Any]):
        def __exit__(self, *args: object) -> None:
            asyncio.get_running_loop().call_later(0.05, os.kill, os.getpid(), signal.SIGTERM)

    run(
        engine,
        create_app(engine, AppSettings(served_names=("fake",)), lifecycle=lifecycle),
        lifecycle,
        listen("127.0.0.1", 0),
        times=ShutdownTimes(timeout_s=1.0, linger_s=0.0),
        display=SignalWhenEntered(),
    )
    assert engine.stopped_with == 1.0
    assert lifecycle.draining
    assert signal.getsignal(signal.SIGTERM) is before


ALL_THE_TIME = ["/live", "/ready", "/health", "/metrics", "/dashboard/data?after=3", "/v1/experts/stats"]


@pytest.mark.parametrize("level", [logging.INFO, logging.DEBUG])
async def test_what_is_asked_for_every_few_seconds_is_logged_for_debug_alone_unless_it_fails(
    engine: FakeEngine, caplog: pytest.LogCaptureFixture, level: int
) -> None:
    caplog.set_level(level, "uvicorn.access")
    async with running(engine) as (server, client):
        await server.until(client, "/health", 200)
        for path in ALL_THE_TIME:
            assert (await client.get(path)).status_code == 200
        await client.get("/v1/models")
        engine.state = "loading"
        await client.get("/v1/experts/stats")
    records = [record for record in caplog.records if record.name == "uvicorn.access"]
    at_debug = {record.getMessage().split()[3] for record in records if record.levelno == logging.DEBUG}
    assert at_debug == (set(ALL_THE_TIME) if level == logging.DEBUG else set())
    told = [record.getMessage() for record in records if record.levelno == logging.INFO]
    assert any("/v1/models" in line for line in told)
    assert [line for line in told if "/v1/experts/stats" in line] == [line for line in told if line.endswith(" 503")]


def test_of_many_refusals_one_line_in_some_seconds_is_logged_and_how_many_there_were() -> None:
    now_s = 100.0
    refusals = Refusals(5.0, lambda: now_s)

    def lines(num: int, status: int = 503) -> list[str]:
        args = ("127.0.0.1:1", "POST", "/v1/completions", "1.1", status)
        records = [logging.LogRecord("a", logging.INFO, "", 0, '%s "%s %s HTTP/%s" %d', args, None) for _ in range(num)]
        return [record.getMessage() for record in records if refusals.filter(record)]

    assert lines(200) == ['127.0.0.1:1 "POST /v1/completions HTTP/1.1" 503']
    assert len(lines(3, 200)) == 3
    now_s += 5.0
    assert lines(2) == ['127.0.0.1:1 "POST /v1/completions HTTP/1.1" 503, and 199 more since the last that is told']
    now_s += 60.0
    assert lines(1)[0].endswith("and 1 more since the last that is told")
    now_s += 60.0
    assert lines(1)[0].endswith("503")
