"""Clients that do what they should not, over real sockets: the others are served, and nothing is left behind."""

from __future__ import annotations

import asyncio
import contextlib
import json
import signal
from collections.abc import AsyncIterator
from typing import Any, ClassVar

import httpx
import pytest

from server.app import create_app
from server.auth import hash_key
from server.context import Lifecycle
from server.http_protocol import MAX_HEADER_NBYTES
from server.serve import ShutdownTimes, listen, serve
from server.settings import AppSettings
from tests.server.fake_engine import FakeEngine, Script, Token

CHAT = {"messages": [{"role": "user", "content": "hi"}], "stream": True}


@contextlib.asynccontextmanager
async def serving(engine: FakeEngine, **settings: Any) -> AsyncIterator[int]:
    """The port."""
    lifecycle = Lifecycle()
    app = create_app(engine, AppSettings(served_names=("fake",), **settings), lifecycle=lifecycle)
    listener = listen("127.0.0.1", 0)
    stop: asyncio.Future[int] = asyncio.get_running_loop().create_future()
    times, display = ShutdownTimes(timeout_s=5.0, linger_s=0.0), contextlib.nullcontext()
    task = asyncio.ensure_future(serve(engine, app, lifecycle, listener, stop=stop, times=times, display=display))
    while not await _answers(listener.getsockname()[1]):
        await asyncio.sleep(0.005)
    try:
        yield listener.getsockname()[1]
    finally:
        stop.set_result(signal.SIGINT)
        await asyncio.wait({task})


class Raw:
    """One connection, written byte by byte if need be; closed at the end of the test."""

    opened: ClassVar[list[Raw]] = []

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader, self.writer = reader, writer
        self.opened.append(self)

    @classmethod
    async def open(cls, port: int, limit: int = 2**16) -> Raw:
        return cls(*await asyncio.open_connection("127.0.0.1", port, limit=limit))

    async def send(self, data: bytes) -> None:
        self.writer.write(data)
        with contextlib.suppress(ConnectionError):
            await self.writer.drain()

    async def answer(self) -> tuple[int, bytes]:
        head = await self.reader.readuntil(b"\r\n\r\n")
        length = next(int(line.split(b":")[1]) for line in head.lower().split(b"\r\n") if b"content-length" in line)
        return int(head.split()[1]), await self.reader.readexactly(length)


@pytest.fixture(autouse=True)
async def _close() -> AsyncIterator[None]:
    yield
    for raw in Raw.opened:
        raw.writer.transport.abort()
        with contextlib.suppress(ConnectionError):
            await raw.writer.wait_closed()
    Raw.opened.clear()


def post(body: bytes, *headers: str, path: str = "/v1/chat/completions") -> bytes:
    lines = [f"POST {path} HTTP/1.1", "Host: x", "Content-Type: application/json", *headers]
    return "\r\n".join([*lines, f"Content-Length: {len(body)}", "", ""]).encode("latin-1") + body


async def eventually(condition: Any) -> None:
    for _ in range(1000):
        if condition():
            return
        await asyncio.sleep(0.01)
    raise AssertionError("it did not happen within ten seconds")


async def is_well(port: int) -> None:
    async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}", trust_env=False) as client:
        assert (await client.get("/health")).status_code == 200


@pytest.mark.parametrize("in_one", [True, False])
@pytest.mark.parametrize("many", [True, False])
async def test_headers_longer_than_64_kib_are_431_before_they_are_complete(
    engine: FakeEngine, in_one: bool, many: bool
) -> None:
    async with serving(engine) as port:
        raw = await Raw.open(port)
        line = b"X-Long: " + b"a" * 1000 + b"\r\n" if many else b"a" * 1000
        head = b"GET /health HTTP/1.1\r\nHost: x\r\n" + (b"" if many else b"X-Long: ")
        flood = head + line * 70  # which is not the end of it
        if in_one:
            await raw.send(flood)
        else:
            for at in range(0, len(flood), 5000):
                await raw.send(flood[at : at + 5000])
                await asyncio.sleep(0)
        status, body = await raw.answer()
        assert status == 431
        assert json.loads(body)["error"]["code"] == "headers_too_large"
        with contextlib.suppress(ConnectionError):
            assert await raw.reader.read() == b""  # and the connection is closed
        await is_well(port)


async def test_long_headers_within_the_limit_pass_again_and_again_on_one_connection(engine: FakeEngine) -> None:
    async with serving(engine) as port:
        raw = await Raw.open(port)
        for _ in range(3):
            await raw.send(b"GET /health HTTP/1.1\r\nHost: x\r\nX: " + b"a" * (MAX_HEADER_NBYTES - 1000) + b"\r\n\r\n")
            assert (await raw.answer())[0] == 200
        body = json.dumps({**CHAT, "stream": False, "pad": "x" * 200_000}).encode()
        await raw.send(post(body))  # a body is no header
        assert (await raw.answer())[0] == 200


@pytest.mark.parametrize(
    "garbage", [b"\x16\x03\x01\x02\x00", b"HELLO\r\n\r\n", b"GET / HTTP/9.9\r\n\r\n", b"\x00" * 100]
)
async def test_what_is_no_http_is_400_and_the_end_of_the_connection(engine: FakeEngine, garbage: bytes) -> None:
    async with serving(engine) as port:
        raw = await Raw.open(port)
        await raw.send(garbage)
        status, body = await raw.answer()
        assert (status, json.loads(body)["error"]["code"]) == (400, "invalid_http")
        await is_well(port)


async def test_a_body_in_many_tiny_chunks_is_a_body(engine: FakeEngine) -> None:
    body = json.dumps({**CHAT, "stream": False}).encode()
    async with serving(engine) as port:
        raw = await Raw.open(port)
        head = post(b"").replace(b"Content-Length: 0", b"Transfer-Encoding: chunked")
        await raw.send(head)
        for byte in body:
            await raw.send(b"1\r\n%c\r\n" % byte)
        await raw.send(b"0\r\n\r\n")
        assert (await raw.answer())[0] == 200


async def test_a_prompt_of_a_megabyte_is_an_answer_about_its_length_while_others_are_served(
    engine: FakeEngine,
) -> None:
    body = json.dumps({"prompt": "long " * 200_000}).encode()
    async with serving(engine) as port:
        raws = [await Raw.open(port) for _ in range(4)]
        await asyncio.gather(*(raw.send(post(body, path="/v1/completions")) for raw in raws))
        await is_well(port)
        for raw in raws:
            status, answer = await raw.answer()
            error = json.loads(answer)["error"]
            assert (status, error["code"]) == (400, "context_length_exceeded")
            assert error["message"].startswith("This model's maximum context length is 64 tokens.")


@pytest.mark.parametrize(
    "content", [b'{"prompt": "\xff\xfe"}', b'{"prompt": "\xed\xa0\x80"}', b"\xef\xbb\xbf{", b"\xc3"]
)
async def test_invalid_utf8_is_400(engine: FakeEngine, content: bytes) -> None:
    async with serving(engine) as port:
        raw = await Raw.open(port)
        await raw.send(post(content, path="/v1/completions"))
        status, body = await raw.answer()
        assert (status, json.loads(body)["error"]["code"]) == (400, "invalid_json")


async def test_a_body_too_large_is_413_without_its_being_read(engine: FakeEngine) -> None:
    async with serving(engine) as port:
        raw = await Raw.open(port)
        await raw.send(post(b"").replace(b"Content-Length: 0", b"Content-Length: 99999999999"))
        status, body = await raw.answer()
        assert (status, json.loads(body)["error"]["code"]) == (413, "request_too_large")


@pytest.mark.parametrize("part", [0, 30, -1])
async def test_who_leaves_while_sending_leaves_nothing(engine: FakeEngine, part: int) -> None:
    async with serving(engine) as port:
        raw = await Raw.open(port)
        await raw.send(post(b'{"messages": [' + b" " * 100)[:part] if part else b"")
        raw.writer.transport.abort()
        await is_well(port)
        assert engine.seen == []


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("first_s", [30.0, 0.0])
async def test_who_leaves_before_or_after_the_first_token_ends_the_request(
    engine: FakeEngine, stream: bool, first_s: float
) -> None:
    engine.script = Script([Token("a", delay_s=first_s), Token("b", delay_s=30.0)])
    async with serving(engine) as port:
        raw = await Raw.open(port)
        await raw.send(post(json.dumps({**CHAT, "stream": stream}).encode()))
        await eventually(lambda: engine.num_open)
        raw.writer.transport.abort()
        await eventually(lambda: not engine.num_open)
        assert engine.num_aborted == 1
        async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}", trust_env=False) as client:
            assert 'code="499"' in (await client.get("/metrics")).text


async def test_a_client_that_never_reads_is_given_up_and_its_request_ended(engine: FakeEngine) -> None:
    engine.script = Script([Token("x" * 200_000, delay_s=0.001)] * 200)  # more than the sockets' buffers hold
    async with serving(engine, send_timeout_s=0.3, heartbeat_s=0.2) as port:
        raw = await Raw.open(port, limit=1024)
        raw.writer.write(post(json.dumps(CHAT).encode()))
        raw.writer.transport.pause_reading()  # type: ignore[attr-defined]
        await eventually(lambda: engine.num_open)
        await eventually(lambda: not engine.num_open)
        assert engine.num_aborted == 1
        await is_well(port)


async def test_a_client_that_reads_slowly_gets_it_all(engine: FakeEngine) -> None:
    engine.script = Script([Token("x" * 100_000)] * 30)
    async with serving(engine, send_timeout_s=5.0) as port:
        raw = await Raw.open(port)
        await raw.send(post(json.dumps(CHAT).encode(), "Connection: close"))
        received = b""
        while piece := await raw.reader.read(20_000):
            received += piece
            await asyncio.sleep(0.001)
        assert received.count(b"x" * 100_000) == 30
        assert b"data: [DONE]\n\n" in received


async def test_guessed_keys_are_401_whatever_they_are_and_compared_as_hashes(
    engine: FakeEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    compared: list[tuple[bytes, bytes]] = []
    from server import auth

    real = auth.hmac.compare_digest
    monkeypatch.setattr(auth.hmac, "compare_digest", lambda a, b: compared.append((a, b)) or real(a, b))
    keys = ("sk-first-0123456789", "sk-second-012345678")
    async with serving(engine, api_key_hashes=tuple(map(hash_key, keys))) as port:
        raw = await Raw.open(port)
        guesses = ["", "sk-first-012345678", "sk-first-0123456789x", "a" * 10_000, "\xff\xfe", "sk-second", "Bearer x"]
        for guess in guesses:
            await raw.send(post(b"{", f"Authorization: Bearer {guess}"))
            status, body = await raw.answer()
            assert (status, json.loads(body)["error"]["code"]) == (401, "invalid_api_key")
            assert not guess or guess.encode("latin-1") not in body
        assert {(len(given), len(known)) for given, known in compared} == {(32, 32)}
        assert len(compared) == len(guesses) * len(keys)  # each of them, even after a match
        await raw.send(post(b"{", f"Authorization: Bearer {keys[0]}"))
        assert (await raw.answer())[0] == 400
        assert len(compared) == (len(guesses) + 1) * len(keys)


async def _answers(port: int) -> bool:
    async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}", trust_env=False) as client:
        try:
            return (await client.get("/health")).status_code == 200
        except httpx.TransportError:
            await asyncio.sleep(0.01)
            return False
