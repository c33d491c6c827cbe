"""server/remote.py."""

from __future__ import annotations

from typing import Any

import httpx
import pytest

from server.remote import RemoteError, api_url, first_model, post_events

URL = "http://test/v1"


def answering(content: bytes | str, status: int = 200) -> httpx.AsyncClient:
    return httpx.AsyncClient(transport=httpx.MockTransport(lambda _: httpx.Response(status, content=content)))


async def events(content: bytes | str, status: int = 200) -> list[dict[str, Any]]:
    async with answering(content, status) as client:
        return [event async for event in post_events(client, URL, {})]


@pytest.mark.parametrize("url", ["http://a:1", "http://a:1/", "http://a:1/v1", "http://a:1/v1/"])
def test_a_url_is_taken_with_or_without_v1(url: str) -> None:
    assert api_url(url) == "http://a:1/v1"


async def test_comments_other_fields_and_what_follows_done_are_passed_over() -> None:
    stream = (
        ': keep-alive\r\n\r\nevent: x\r\ndata: {"a": 1}\r\n\r\ndata:{"a":2,"error":null}\n\ndata: [DONE]\n\ndata: {}\n'
    )
    assert await events(stream) == [{"a": 1}, {"a": 2, "error": None}]


async def test_an_event_may_contain_what_unicode_calls_a_line_end() -> None:
    assert await events('data: {"text": "a\u2028b\u0085c"}\n\ndata: [DONE]\n\n') == [{"text": "a\u2028b\u0085c"}]


@pytest.mark.parametrize(
    ("content", "status", "words"),
    [
        ('{"error": {"message": "too long"}}', 400, "^the server answered 400: too long$"),
        ("<html>", 502, "^the server answered 502$"),
        ("[1]", 500, "^the server answered 500$"),
        ('data: {"error": {"message": "broken"}}\n\ndata: [DONE]\n\n', 200, "^broken$"),
        ('data: {"error": "broken"}\n\n', 200, "^broken$"),
        ("data: {\n\n", 200, "not a JSON object"),
        ("data: [1]\n\n", 200, "not a JSON object"),
        ('data: {"a": 1}\n\n', 200, "without \\[DONE\\]"),
        ("", 200, "without \\[DONE\\]"),
    ],
)
async def test_whatever_is_not_a_whole_stream_is_told(content: str, status: int, words: str) -> None:
    with pytest.raises(RemoteError, match=words):
        await events(content, status)


async def test_the_first_model_is_the_first_that_is_listed() -> None:
    async with answering('{"data": [{"id": "a"}, {"id": "b"}]}') as client:
        assert await first_model(client, URL) == "a"


@pytest.mark.parametrize(
    ("content", "status", "words"),
    [
        ('{"error": {"message": "loading"}}', 503, "503: loading"),
        ('{"data": []}', 200, "names no model"),
        ("[]", 200, "names no model"),
        ("<html>", 200, "names no model"),
    ],
)
async def test_a_server_without_a_model_is_told(content: str, status: int, words: str) -> None:
    async with answering(content, status) as client:
        with pytest.raises(RemoteError, match=words):
            await first_model(client, URL)


@pytest.mark.parametrize("url", ["http://127.0.0.1:9/v1", "127.0.0.1:9/v1"])
async def test_a_server_that_is_not_there_is_told(url: str) -> None:
    async with httpx.AsyncClient(trust_env=False) as client:
        with pytest.raises(RemoteError, match=f"no answer from {url}.*is a server running there"):
            await first_model(client, url)
        with pytest.raises(RemoteError, match=f"no answer from {url}.*is a server running there"):
            [event async for event in post_events(client, url, {})]
