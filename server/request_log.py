"""The latest requests for tokens: when, how many, how fast, how they ended. Never a word of what was said."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import Protocol

import msgspec

from engine.messages import RequestOutput

_LOGGED = ("completions", "responses", "messages")  # last parts of endpoints that make tokens


class Watcher(Protocol):
    """Is told of every output of one request."""

    def saw(self, index: int, output: RequestOutput) -> None: ...


class RequestFacts(Protocol):
    """What the middleware knows of a request, when it knows it."""

    request_id: str
    started_s: float
    stream: bool
    finish_reason: str

    @property
    def code(self) -> str: ...


class RequestLine(msgspec.Struct, frozen=True, kw_only=True):
    """One request as the dashboard shows it. Counts are of all its choices; times are seconds."""

    id: str
    endpoint: str
    stream: bool
    age_s: float  # since it came
    running: bool
    code: str  # "" while it runs; 499: the client left
    finish_reason: str
    prompt_tokens: int
    output_tokens: int
    ttft_s: float | None  # from its arrival to its first token
    tokens_per_s: float | None  # after the first token
    seconds: float  # from its arrival to its end, or until now


class LoggedRequest:
    """Counts one request's outputs as they pass."""

    def __init__(
        self, record: RequestFacts, endpoint: str, clock: Callable[[], float], watcher: Watcher | None
    ) -> None:
        self._record = record
        self._endpoint = endpoint
        self._clock = clock
        self._watcher = watcher
        self._latest: dict[int, RequestOutput] = {}  # by choice
        self._first_s: float | None = None  # when the first token came
        self._last_s = 0.0
        self._ended_s: float | None = None
        self._num_first = 0  # tokens that came first of all

    @property
    def started_s(self) -> float:
        return self._record.started_s

    @property
    def was_turned_away(self) -> bool:
        return self._record.code == "503" and not self._latest

    def saw(self, index: int, output: RequestOutput) -> None:
        """The next output of one choice."""
        if self._watcher is not None:
            self._watcher.saw(index, output)
        self._latest[index] = output
        if output.token_ids:
            self._last_s = self._clock()
            if self._first_s is None:
                self._first_s, self._num_first = self._last_s, len(output.token_ids)

    def ended(self) -> None:
        self._ended_s = self._clock()

    def line(self, now_s: float) -> RequestLine:
        """As of now."""
        num_output = sum(output.num_output_tokens for output in self._latest.values())
        rate = None
        if self._first_s is not None and self._last_s > self._first_s:
            rate = (num_output - self._num_first) / (self._last_s - self._first_s)
        is_running = self._ended_s is None
        return RequestLine(
            id=self._record.request_id,
            endpoint=self._endpoint,
            stream=self._record.stream,
            age_s=now_s - self.started_s,
            running=is_running,
            code="" if is_running else self._record.code,
            finish_reason=self._record.finish_reason,
            prompt_tokens=sum(output.num_prompt_tokens for output in self._latest.values()),
            output_tokens=num_output,
            ttft_s=None if self._first_s is None else self._first_s - self.started_s,
            tokens_per_s=rate,
            seconds=(now_s if self._ended_s is None else self._ended_s) - self.started_s,
        )


class RequestLog:
    """Those that run, and the last `keep` that have ended. All calls from one event loop."""

    def __init__(self, clock: Callable[[], float], keep: int = 60) -> None:
        self._clock = clock
        self._running: dict[int, LoggedRequest] = {}  # by identity: clients may choose the same id twice
        self._ended: deque[LoggedRequest] = deque(maxlen=keep)
        self.num_turned_away = 0  # with 503

    def begin(self, record: RequestFacts, endpoint: str, watcher: Watcher | None = None) -> LoggedRequest:
        """A request that will make tokens; what it `saw`, `watcher` sees too."""
        logged = LoggedRequest(record, endpoint, self._clock, watcher)
        self._running[id(logged)] = logged
        return logged

    def end(self, logged: LoggedRequest) -> None:
        """Its record is complete. Those that found no room are only counted, or they would soon be all there is."""
        logged.ended()
        self._running.pop(id(logged), None)
        if logged.was_turned_away:
            self.num_turned_away += 1
        else:
            self._ended.append(logged)

    def refuse(self, record: RequestFacts, endpoint: str) -> None:
        """A request ended before it had begun."""
        if endpoint.rsplit("/", 1)[-1] in _LOGGED:
            self.end(self.begin(record, endpoint))

    def lines(self, most: int = 60) -> list[RequestLine]:
        """Newest first: those that run, then the others."""
        now_s = self._clock()
        running = sorted(self._running.values(), key=lambda logged: -logged.started_s)
        ended = sorted(self._ended, key=lambda logged: -logged.started_s)
        return [logged.line(now_s) for logged in [*running, *ended][:most]]
