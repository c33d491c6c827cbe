"""server/trace_client.py and `foregate trace record`, with a server on a port."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from cache.trace import load
from engine.messages import TraceRecorded
from server.app import create_app
from server.auth import hash_key
from server.context import Lifecycle
from server.serve import ShutdownTimes, listen, serve
from server.settings import AppSettings
from tests.cache.synthetic_traces import local_trace
from tests.server.fake_engine import FakeEngine


@pytest.fixture
def server(engine: FakeEngine, tmp_path: Path) -> Iterator[str]:
    """The URL of a server on a thread, whose key is "secret"."""
    trace = local_trace(0, [20] * 4)
    trace.save(tmp_path / "sent.npz")
    npz = (tmp_path / "sent.npz").read_bytes()
    engine.recorded = TraceRecorded(trace_id="t", npz=npz, num_tokens=80, num_requests=4)
    listener = listen("127.0.0.1", 0)
    url = f"http://127.0.0.1:{listener.getsockname()[1]}"
    stop: list[Any] = []

    async def run() -> None:
        lifecycle = Lifecycle()
        settings = AppSettings(served_names=("fake",), api_key_hashes=(hash_key("secret"),))
        stopped = asyncio.get_running_loop().create_future()
        stop.extend((asyncio.get_running_loop(), stopped))
        await serve(
            engine,
            create_app(engine, settings, lifecycle=lifecycle),
            lifecycle,
            listener,
            stop=stopped,
            times=ShutdownTimes(timeout_s=1.0, linger_s=0.0),
            display=contextlib.nullcontext(),
        )

    thread = threading.Thread(target=asyncio.run, args=(run(),))
    thread.start()
    yield url
    stop[0].call_soon_threadsafe(stop[1].set_result, signal.SIGINT)
    thread.join(10.0)
    assert not thread.is_alive()


@pytest.fixture
def record(foregate: Any, server: str, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setenv("FOREGATE_API_KEY", "secret")
    return lambda *args: foregate("trace", "record", "--url", server, *args)


def test_a_recording_is_written_where_it_was_asked_for(record: Any, engine: FakeEngine, tmp_path: Path) -> None:
    out = tmp_path / "new" / "trace.npz"
    result = record("--seconds", "0.2", "--out", str(out), "--domain", "chat", "--max-tokens", "100")
    assert (result.code, result.out) == (0, f"{out}: 80 tokens of 4 requests\n")
    assert "recording" in result.err
    assert engine.recordings == [(0.2, 100, "chat")]
    assert load(out).num_tokens == 80
    assert list(out.parent.iterdir()) == [out]


def test_a_full_recording_is_told(record: Any, engine: FakeEngine, tmp_path: Path) -> None:
    engine.recorded = TraceRecorded(trace_id="t", npz=b"PK", num_tokens=1, num_requests=1, is_full=True)
    assert record("--seconds", "0.1", "--out", str(tmp_path / "a.npz")).out.endswith("1 requests, where it was full\n")


def test_an_interrupt_ends_it_early_and_keeps_what_was_recorded(
    record: Any, engine: FakeEngine, tmp_path: Path
) -> None:
    def interrupt() -> None:
        while engine.trace_ends is None:
            ended.wait(0.01)
        os.kill(os.getpid(), signal.SIGINT)

    ended = threading.Event()
    before = signal.getsignal(signal.SIGINT)
    threading.Thread(target=interrupt).start()
    result = record("--seconds", "60", "--out", str(tmp_path / "trace.npz"))
    assert (result.code, result.out) == (0, f"{tmp_path / 'trace.npz'}: 80 tokens of 4 requests\n")
    assert load(tmp_path / "trace.npz").num_requests == 4
    assert signal.getsignal(signal.SIGINT) is before


def test_a_place_that_cannot_be_written_is_told_before_anything_is_recorded(
    record: Any, engine: FakeEngine, tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("")
    for place in (tmp_path / "file" / "trace.npz", tmp_path, tmp_path / "trace.json"):
        result = record("--seconds", "0.1", "--out", str(place))
        assert (result.code, result.err.count("\n")) == (1, 1)
        assert f"cannot write routing trace {place}: " in result.err
    assert not engine.recordings


def test_what_fails_leaves_what_was_there(
    record: Any, engine: FakeEngine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out" / "trace.npz"
    out.parent.mkdir()
    out.write_text("before")
    engine.recorded = TraceRecorded(trace_id="t", npz=b"PK")
    result = record("--seconds", "0.1", "--out", str(out))
    assert result.code == 1
    assert "there is nothing to keep" in result.err
    monkeypatch.setenv("FOREGATE_API_KEY", "wrong")
    result = record("--seconds", "0.1", "--out", str(out))
    assert result.code == 1
    assert "error: the server answered 401: incorrect or missing API key" in result.err
    result = record("--seconds", "0.1", "--out", str(out), "--url", "http://127.0.0.1:9")
    assert "is a server running there?" in result.err
    assert [(path, path.read_text()) for path in out.parent.iterdir()] == [(out, "before")]
