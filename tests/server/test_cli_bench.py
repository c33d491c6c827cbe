"""server/cli_bench.py: `foregate bench serve` against a server on a real port."""

from __future__ import annotations

import contextlib
import json
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import uvicorn
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from server.app import create_app
from server.auth import hash_key
from server.serve import listen
from server.settings import AppSettings
from tests.server.fake_engine import FakeEngine, Script, Token

SIZES = ("--prompt-tokens", "8", "--output-tokens", "5", "--token-ids", "0-255", "--concurrency", "1,2")
ENOUGH = Script([Token("x")] * 64)


@pytest.fixture
def serving(engine: FakeEngine) -> Iterator[Callable[[ASGIApp], str]]:
    """`serving(app)` -> the URL at which a thread serves it."""
    engine.script = ENOUGH
    with contextlib.ExitStack() as stack:

        def start(app: ASGIApp) -> str:
            listener = stack.enter_context(listen("127.0.0.1", 0))
            server = uvicorn.Server(uvicorn.Config(app, lifespan="off", log_config=None))
            thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
            thread.start()
            stack.callback(thread.join)
            stack.callback(setattr, server, "should_exit", True)
            return f"http://127.0.0.1:{listener.getsockname()[1]}"

        yield start


def application(engine: FakeEngine, **settings: Any) -> ASGIApp:
    return create_app(engine, AppSettings(served_names=("fake",), **settings))


class CutsStreams:
    """Passes requests on; of the `nth` completion only the beginning is sent."""

    def __init__(self, app: ASGIApp, nth: int) -> None:
        self._app, self._nth, self._num_seen = app, nth, 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        self._num_seen += scope["path"].endswith("/completions")
        await self._app(scope, receive, self._cutting(send) if self._num_seen == self._nth else send)

    def _cutting(self, send: Send) -> Send:
        num_parts = 0

        async def cutting(message: Message) -> None:
            nonlocal num_parts
            num_parts += message["type"] == "http.response.body"
            if num_parts < 3:
                await send(message)

        return cutting


def test_each_concurrency_is_a_json_object(
    foregate: Any, serving: Callable[[ASGIApp], str], engine: FakeEngine
) -> None:
    result = foregate("bench", "serve", "--url", serving(application(engine)), *SIZES, "--json")
    assert (result.code, result.err) == (0, "")
    lines = [json.loads(line) for line in result.out.splitlines()]
    assert [(line["concurrency"], line["num_requests"], line["num_errors"]) for line in lines] == [(1, 4, 0), (2, 6, 0)]
    assert all(line["ttft_s"]["p99"] >= line["ttft_s"]["p50"] > 0 for line in lines)


def test_each_concurrency_is_a_line_of_the_table(
    foregate: Any, serving: Callable[[ASGIApp], str], engine: FakeEngine
) -> None:
    url = serving(application(engine))
    result = foregate("bench", "serve", "--url", f"{url}/v1", *SIZES, "--num-requests", "5", "--model", "fake")
    assert (result.code, result.err) == (0, "")
    rows = [line.split() for line in result.out.splitlines()]
    assert [row[:3] for row in rows[2:]] == [["1", "5", "0"], ["2", "5", "0"]]
    assert {len(row) for row in rows[2:]} == {13}


def test_errors_are_counted_and_told_and_the_exit_code_is_1(
    foregate: Any, serving: Callable[[ASGIApp], str], engine: FakeEngine
) -> None:
    short = Script([Token("x")] * 2)
    scripts = iter([ENOUGH, ENOUGH, short, Script([], failure=RuntimeError("secret")), short, *[ENOUGH] * 6])
    engine.script = lambda prompt: next(scripts)
    result = foregate("bench", "serve", "--url", serving(application(engine)), *SIZES, "--json")
    assert result.code == 1
    assert [json.loads(line)["num_errors"] for line in result.out.splitlines()] == [3, 0]
    assert result.err.startswith("error: 3 of 4 requests failed: 2 x the server counted 2 output tokens instead of 5; ")
    assert "1 x the server answered 500" in result.err
    assert result.err.count("\n") == 1


def test_a_stream_that_is_cut_off_is_an_error(
    foregate: Any, serving: Callable[[ASGIApp], str], engine: FakeEngine
) -> None:
    url = serving(CutsStreams(application(engine), nth=3))
    result = foregate("bench", "serve", "--url", url, *SIZES)
    assert result.code == 1
    assert "error: 1 of 4 requests failed: 1 x the stream broke off: " in result.err


def test_tokens_from_the_servers_cache_are_warned_of(
    foregate: Any, serving: Callable[[ASGIApp], str], engine: FakeEngine
) -> None:
    engine.script = Script([Token("x")] * 64, num_cached_tokens=3)
    result = foregate("bench", "serve", "--url", serving(application(engine)), *SIZES, "--concurrency", "1")
    assert result.code == 0
    assert result.err == "warning: the server had 12 prompt tokens in its cache; take another --seed\n"


def test_the_key_comes_from_the_environment_or_the_option(
    foregate: Any, serving: Callable[[ASGIApp], str], engine: FakeEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    url = serving(application(engine, api_key_hashes=(hash_key("key"),)))
    refused = foregate("bench", "serve", "--url", url, *SIZES)
    assert (refused.code, refused.out) == (1, "")
    assert refused.err.startswith("error: the server answered 401: ")
    assert foregate("bench", "serve", "--url", url, *SIZES, "--api-key", "key").code == 0
    monkeypatch.setenv("FOREGATE_API_KEY", "key")
    assert foregate("bench", "serve", "--url", url, *SIZES).code == 0
    assert foregate("bench", "serve", "--url", url, *SIZES, "--api-key", "other").code == 1


@pytest.mark.parametrize(
    ("options", "code", "words"),
    [
        (["--concurrency", "1,x"], 1, "--concurrency '1,x' is not a list of numbers; write it like 1,8,32"),
        (["--concurrency", "1,8", "--num-requests", "7"], 1, "--num-requests 7 cannot keep 8 busy"),
        (["--token-ids", "5"], 2, "write them like 1000-29999"),
        (["--token-ids", "9-5"], 2, "write them like 1000-29999"),
        (["--output-tokens", "1"], 2, "--output-tokens"),
        (["--url", "http://127.0.0.1:9"], 1, "is a server running there?"),
    ],
)
def test_what_cannot_be_measured_is_told(foregate: Any, options: list[str], code: int, words: str) -> None:
    result = foregate("bench", "serve", *options)
    assert (result.code, result.out) == (code, "")
    assert words in result.err
