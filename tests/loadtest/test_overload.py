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
        found = asyncio.run(overload(server.url, 0.6, 2, 2, 10.0, 5, None))
    finally:
        server.stop()
    assert found.num_failed == 0
    assert found.num_refused > found.num_served > 0
    assert min(found.capacity_tokens_per_s) > 0
    assert len(found.goodput_tokens_per_s) == len(found.capacity_tokens_per_s) - 1 == 2
    assert min(found.goodput_tokens_per_s) > 0
    assert found.goodput_share > 0
    assert 0 < found.rejection_p50_ms <= found.rejection_p99_ms
    assert found.rss_mb == []


def test_an_answer_that_breaks_off_has_failed() -> None:
    server = LiveServer(FakeEngine(Script([Token("x", delay_s=0.01)], finish_reason="error", error="boom")))
    try:
        found = asyncio.run(overload(server.url, 0.3, 1, 1, 1.0, 1, None))
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


def test_a_connection_is_used_again_after_a_refusal_and_after_a_stream_that_was_read_to_its_end() -> None:
    engine = _Two(Script([Token("x")] * 3))
    server = LiveServer(engine)

    async def ask() -> list[int]:
        client, found = LightClient(server.url), []
        for is_full in (False, True, False, True):
            engine.num_open = 2 * is_full
            sent = await client.exchange(client.request("/v1/completions", {"prompt": "a", "stream": True}))
            found.append(await sent.status())
            if is_full:
                await sent.skip()
            else:
                text = b"".join([piece async for piece in sent.pieces()])
                assert text.count(b'"text":"x"') == 3
                assert b"[DONE]" in text
            sent.close()
            assert len(client._idle) == 1
        await client.close()
        return found

    try:
        assert asyncio.run(ask()) == [200, 503, 200, 503]
    finally:
        server.stop()


def test_a_light_client_speaks_plain_http_only() -> None:
    with pytest.raises(ValueError, match="http://"):
        LightClient("https://example.com")
