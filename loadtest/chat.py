"""One streamed chat over gevent's sockets, and when its tokens came. Knows nothing of scenarios or statistics."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any
from urllib.parse import urlsplit

import gevent
import msgspec
from geventhttpclient import HTTPClient
from geventhttpclient.response import HTTPSocketPoolResponse

from server.measures import Answer, StreamTimes
from server.remote import RemoteError, api_url

_MAX_CONNECTIONS = 10_000


class AskFailed(Exception):
    """`code` is the HTTP status, or in a word what failed without one."""

    def __init__(self, code: str, message: str) -> None:
        super().__init__(message)
        self.code = code


class Cancelled(Exception):
    """We hung up, as we were told to."""


class ChatClient:
    """Of one server, for any number of greenlets."""

    def __init__(
        self,
        url: str,
        *,
        api_key: str | None = None,
        timeout_s: float = 600.0,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        """`timeout_s`: of the silence between two reads. Raises `ValueError` for an `url` that is none."""
        base = api_url(url)
        if urlsplit(base).scheme not in ("http", "https"):
            raise ValueError(f"{url!r} is no address of a server; write it like http://127.0.0.1:8000")
        self._path = urlsplit(base).path
        self._clock = clock
        headers = {"Content-Type": "application/json", "Accept": "text/event-stream"}
        if api_key:
            headers["Authorization"] = f"Bearer {api_key}"
        self._http = HTTPClient.from_url(
            base,
            headers=headers,
            concurrency=_MAX_CONNECTIONS,
            connection_timeout=min(timeout_s, 30.0),
            network_timeout=timeout_s,
        )

    def first_model(self) -> str:
        """The first name that is served; raises `AskFailed`."""
        try:
            response = self._http.get(f"{self._path}/models")
            with response:
                body, status = response.read(), response.status_code
        except Exception as exc:  # geventhttpclient's parser, the socket, the name's look-up
            raise AskFailed("no answer", f"no answer: {exc or type(exc).__name__}; is a server running there?") from exc
        if status != 200:
            raise AskFailed(str(status), _refusal(body, status))
        try:
            return str(msgspec.json.decode(body)["data"][0]["id"])
        except (msgspec.DecodeError, LookupError, TypeError):
            raise AskFailed("200", "/v1/models names no model") from None

    def ask(
        self,
        body: dict[str, Any],
        *,
        sent_at: float | None = None,
        cancel_after_s: float | None = None,
        on_token: Callable[[float], None] = lambda _: None,
    ) -> Answer:
        """Send it and read its whole stream. `sent_at`: when it should have been sent, if that is earlier than now.

        `on_token` is told when each chunk with tokens came. Raises `AskFailed`, and `Cancelled` after `cancel_after_s`.
        """
        times = StreamTimes(self._clock() if sent_at is None else sent_at)
        hang_up = gevent.Timeout(cancel_after_s, Cancelled())
        response = None
        try:
            with hang_up:
                response = self._http.post(
                    f"{self._path}/chat/completions",
                    body=msgspec.json.encode({**body, "stream": True, "stream_options": {"include_usage": True}}),
                )
                if response.status_code != 200:
                    status = response.status_code
                    raise AskFailed(str(status), _refusal(response.read(), status))
                self._read(response, times, on_token)
        except (AskFailed, Cancelled):
            raise
        except RemoteError as exc:
            raise AskFailed("stream", str(exc)) from exc
        except Exception as exc:
            what = "no answer" if response is None else "broken"
            raise AskFailed(what, f"{what}: {exc or type(exc).__name__}") from exc
        finally:
            if response is not None:
                response.release()  # of a stream that has not ended this closes the connection
        try:
            return times.answer(self._clock())
        except RemoteError as exc:
            raise AskFailed("stream", str(exc)) from exc

    def close(self) -> None:
        self._http.close()

    def _read(self, response: HTTPSocketPoolResponse, times: StreamTimes, on_token: Callable[[float], None]) -> None:
        done = False
        while line := response.readline(b"\n"):
            now = self._clock()
            if not line.startswith(b"data:"):
                continue
            data = line.removeprefix(b"data:").strip()
            if data == b"[DONE]":
                done = True  # and read on to the end, so that the connection can be used again
            elif not done:
                event = msgspec.json.decode(data, type=dict[str, Any])
                if event.get("error") is not None:
                    raise AskFailed("stream", str(event["error"].get("message", event["error"])))
                if times.saw(event, now):
                    on_token(now)
        if not done:
            raise AskFailed("broken", "the stream ended without [DONE]")


def _refusal(body: bytes, status: int) -> str:
    try:
        return f"{status}: {msgspec.json.decode(body)['error']['message']}"
    except (msgspec.DecodeError, LookupError, TypeError):
        return str(status)
