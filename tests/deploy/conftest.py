"""What a server really offers, to hold the deployment's files against."""

from __future__ import annotations

import httpx
import pytest

from server.app import create_app
from server.auth import hash_key
from server.settings import AppSettings
from tests.server.fake_engine import FakeEngine


def _client(app: object) -> httpx.AsyncClient:
    return httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://test", trust_env=False)  # type: ignore[arg-type]


@pytest.fixture
async def served_metrics() -> set[str]:
    """Names of the families that /metrics tells."""
    async with _client(create_app(FakeEngine(), AppSettings(served_names=("fake",)))) as client:
        text = (await client.get("/metrics")).text
    return {line.split()[2] for line in text.splitlines() if line.startswith("# TYPE")}


@pytest.fixture
async def paths_without_key() -> set[str]:
    """Of those that are asked for by probes."""
    settings = AppSettings(served_names=("fake",), api_key_hashes=(hash_key("secret"),))
    async with _client(create_app(FakeEngine(), settings)) as client:
        return {path for path in ("/health", "/ready", "/live") if (await client.get(path)).status_code == 200}
