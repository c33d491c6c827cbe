"""The client's side of an OpenAI-compatible server: its address, its refusals in words, its streams of events."""

from __future__ import annotations

from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from typing import Any, BinaryIO

import httpx
import msgspec

from engine.errors import ConfigError


class RemoteError(ConfigError):
    """The server at the other end is not there, refuses, or breaks off; the message says which, in its own words."""


def server_url(url: str) -> str:
    """'http://host:8000', with or without /v1 -> 'http://host:8000'."""
    return url.rstrip("/").removesuffix("/v1")


def api_url(url: str) -> str:
    """'http://host:8000', with or without /v1 -> 'http://host:8000/v1'."""
    return server_url(url) + "/v1"


def authorization(keys: Sequence[str]) -> dict[str, str]:
    """The header that presents the first key, if there is one."""
    return {"Authorization": f"Bearer {keys[0]}"} if keys else {}


async def first_model(client: httpx.AsyncClient, url: str) -> str:
    """The first name that the API at `url` (see `api_url`) serves; raises `RemoteError`."""
    try:
        response = await client.get(f"{url}/models")
    except (httpx.HTTPError, httpx.InvalidURL) as exc:
        raise _no_answer(url, exc) from exc
    if response.status_code != 200:
        raise RemoteError(_refusal(response.content, response.status_code))
    try:
        return str(msgspec.json.decode(response.content)["data"][0]["id"])
    except (msgspec.DecodeError, LookupError, TypeError):
        raise RemoteError(f"{url}/models names no model") from None


async def post_events(
    client: httpx.AsyncClient, url: str, body: dict[str, Any]
) -> AsyncGenerator[dict[str, Any], None]:
    """POST and yield the JSON of each server-sent event; raises `RemoteError`, also for a stream without [DONE]."""
    started = done = False
    try:
        async with client.stream("POST", url, json=body) as response:
            started = True
            if response.status_code != 200:
                raise RemoteError(_refusal(await response.aread(), response.status_code))
            async for data in _data_lines(response):
                if data == b"[DONE]":
                    done = True  # and read on to the end, so that the connection can be used again
                elif not done:
                    yield _event(data)
    except (httpx.HTTPError, httpx.InvalidURL) as exc:
        raise RemoteError(f"the stream broke off: {_text(exc)}") if started else _no_answer(url, exc) from exc
    if not done:
        raise RemoteError("the stream ended without [DONE]")


async def download(client: httpx.AsyncClient, url: str, body: dict[str, Any], file: BinaryIO) -> httpx.Headers:
    """POST, write the answer to `file`, return its headers; raises `RemoteError`, also for half an answer."""
    started = False
    try:
        async with client.stream("POST", url, json=body) as response:
            started = True
            if response.status_code != 200:
                raise RemoteError(_refusal(await response.aread(), response.status_code))
            async for part in response.aiter_bytes():
                file.write(part)
            return response.headers
    except (httpx.HTTPError, httpx.InvalidURL) as exc:
        raise RemoteError(f"the answer broke off: {_text(exc)}") if started else _no_answer(url, exc) from exc


async def end_remote(client: httpx.AsyncClient, url: str) -> None:
    """DELETE what a POST to the same place has going on; that it is over already is no error."""
    try:
        await client.delete(url)
    except httpx.HTTPError as exc:
        raise _no_answer(url, exc) from exc


async def _data_lines(response: httpx.Response) -> AsyncIterator[bytes]:
    """What follows `data:`. Not by httpx's lines, which also end at U+2028 and its like: JSON may contain those."""
    rest = b""
    async for part in response.aiter_bytes():
        *lines, rest = (rest + part).split(b"\n")
        for line in lines:
            if line.startswith(b"data:"):
                yield line.removeprefix(b"data:").strip()


def _event(data: bytes) -> dict[str, Any]:
    try:
        event = msgspec.json.decode(data, type=dict[str, Any])
    except msgspec.DecodeError as exc:
        raise RemoteError(f"an event of the stream is not a JSON object: {exc}") from None
    error = event.get("error")
    if error is not None:
        raise RemoteError(str(error.get("message", error)) if isinstance(error, dict) else str(error))
    return event


def _refusal(body: bytes, status: int) -> str:
    try:
        return f"the server answered {status}: {msgspec.json.decode(body)['error']['message']}"
    except (msgspec.DecodeError, LookupError, TypeError):
        return f"the server answered {status}"


def _no_answer(url: str, exc: Exception) -> RemoteError:
    return RemoteError(f"no answer from {url}: {_text(exc)}; is a server running there?")


def _text(exc: Exception) -> str:
    return str(exc) or type(exc).__name__
