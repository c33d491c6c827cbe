"""`loadtest.overload` and `loadtest.cancel` against servers of which it is known what they should find."""

from __future__ import annotations

import asyncio

import pytest

from engine.errors import EngineOverloaded
from loadtest.cancel import cancel
from loadtest.light_client import LightClient
from loadtest.overload import overload
from tests.server.fake_engine import FakeEngine, Script, Token
from tests.server.live_server import LiveServer


class _Two(FakeEngine):
    """Serves two at once, and refuses more."""

    def check_room(self) -> None:
        if self.num_open >= 2:
            raise EngineOverloaded("the queue is full")


def test_what_is_refused_under_ten_times_the_load_is_told_apart_from_what_is_served() -> None:
    server = LiveServer(_Two(Script([Token("x", delay_s=0.02)] * 5)))
    try:
        found = asyncio.run(overload(LightClient(server.url), 1.0, 2, 10.0, 5, None))
    finally:
        server.stop()
    assert found.num_failed == 0
    assert found.num_refused > found.num_served > 0
    assert min(found.capacity_tokens_per_s) > 0
    assert found.goodput_tokens_per_s > 0
    assert 0 < found.rejection_p50_ms <= found.rejection_p99_ms
    assert found.rss_mb == []


def test_an_answer_that_breaks_off_has_failed() -> None:
    server = LiveServer(FakeEngine(Script([Token("x", delay_s=0.01)], finish_reason="error", error="boom")))
    try:
        found = asyncio.run(overload(LightClient(server.url), 0.3, 1, 1.0, 1, None))
    finally:
        server.stop()
    assert found.num_failed > 0
    assert not found.ok


def test_all_that_hung_up_are_counted_and_the_next_is_answered() -> None:
    server = LiveServer(FakeEngine(Script([Token("x", delay_s=0.01)] * 30)))
    try:
        found = asyncio.run(cancel(server.url, 20, 100, 4, 0.05))
    finally:
        server.stop()
    assert found.num_cancelled == found.num_counted_499 == 20
    assert found.integrity_error is None
    assert found.next_answer_s > 0


def test_a_light_client_speaks_plain_http_only() -> None:
    with pytest.raises(ValueError, match="http://"):
        LightClient("https://example.com")
