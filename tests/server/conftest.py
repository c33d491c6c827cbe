"""A client of an application around a scripted engine, which listens on no port, and the command line."""

from __future__ import annotations

import sys
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import httpx
import pytest

from server import cli
from server.app import create_app
from server.context import Lifecycle
from server.settings import AppSettings
from tests.server.fake_engine import FakeEngine


@pytest.fixture
def engine() -> FakeEngine:
    return FakeEngine()


@pytest.fixture
async def connect(engine: FakeEngine) -> AsyncIterator[Callable[..., httpx.AsyncClient]]:
    """`connect(**settings)` -> a client of a new application."""
    clients: list[httpx.AsyncClient] = []

    def make(lifecycle: Lifecycle | None = None, **settings: Any) -> httpx.AsyncClient:
        settings = {"served_names": ("fake", "org/alias"), **settings}
        app = create_app(engine, AppSettings(**settings), lifecycle=lifecycle)
        client = httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://test", trust_env=False)
        clients.append(client)
        return client

    yield make
    for client in clients:
        await client.aclose()


@pytest.fixture
def client(connect: Callable[..., httpx.AsyncClient]) -> httpx.AsyncClient:
    return connect()


class Result:
    def __init__(self, code: int, out: str, err: str) -> None:
        self.code, self.out, self.err = code, out, err


@pytest.fixture
def foregate(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> Any:
    """`foregate("serve", ...)` in this process, with its own FOREGATE_HOME."""
    monkeypatch.setenv("FOREGATE_HOME", str(tmp_path / "home"))
    monkeypatch.delenv("FOREGATE_API_KEY", raising=False)
    # the root logger is pytest's
    monkeypatch.setattr("logging.basicConfig", lambda **_: None)

    def call(*args: str) -> Result:
        monkeypatch.setattr(sys, "argv", ["foregate", *args])
        code: Any = 0
        try:
            cli.main()
        except SystemExit as exc:
            code = exc.code or 0
        out, err = capsys.readouterr()
        return Result(code, out, err)

    return call
