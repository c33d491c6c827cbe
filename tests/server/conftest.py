"""A client of an application around a scripted engine; nothing listens on a port."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from typing import Any

import httpx
import pytest

from server.app import create_app
from server.settings import AppSettings
from tests.server.fake_engine import FakeEngine


@pytest.fixture
def engine() -> FakeEngine:
    return FakeEngine()


@pytest.fixture
async def connect(engine: FakeEngine) -> AsyncIterator[Callable[..., httpx.AsyncClient]]:
    """`connect(**settings)` -> a client of a new application."""
    clients: list[httpx.AsyncClient] = []

    def make(**settings: Any) -> httpx.AsyncClient:
        app = create_app(engine, AppSettings(**{"served_names": ("fake", "org/alias"), **settings}))
        client = httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://test", trust_env=False)
        clients.append(client)
        return client

    yield make
    for client in clients:
        await client.aclose()


@pytest.fixture
def client(connect: Callable[..., httpx.AsyncClient]) -> httpx.AsyncClient:
    return connect()
