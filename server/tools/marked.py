"""Calls between marks: an opening mark, a header with the function's name, a JSON object of arguments, a trailer."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from typing import Any

from server.tools.events import CallArguments, CallBegins, Content, Event, overlap
from server.tools.family import Tool
from server.tools.json_scan import JsonScan

_MAX_HEADER_CHARS = 400
_MAX_TRAILER_CHARS = 40
_NO_TRAILER = re.compile(r"\s*\}?\s*\]?")  # of a model that forgot it


class MarkedCalls:
    """An `AnswerParser`. White space beside a call is no content."""

    def __init__(
        self,
        tools: Sequence[Tool],
        *,
        opens: tuple[str, ...],
        header: re.Pattern[str],
        trailer: re.Pattern[str],
        is_certain: bool,
        noise: tuple[str, ...] = (),
    ) -> None:
        """`header` has a group "name" and ends where the arguments begin; it is searched for directly after an opening
        mark, and after a trailer with a group "more" that matched. `noise`: marks around all calls."""
        self._names = {tool.name for tool in tools}
        self._opens = opens
        self._header = header
        self._trailer = trailer
        self._is_certain = is_certain
        self._noise = noise
        self._buffer = ""
        self._space = ""  # that may be beside a call
        self._after_call = False
        self._opened: str | None = None  # the mark, while in a call
        self._whole = JsonScan()  # of the object that name and arguments are in
        self._arguments: JsonScan | None = None
        self._begin = self._told = 0  # in the buffer: arguments, and how much of them was told

    def push(self, text: str) -> list[Event]:
        self._buffer += text
        return self._read(ended=False)

    def finish(self) -> list[Event]:
        events = self._read(ended=True)
        if self._opened is not None:
            events += self._give_up()
        events += self._content(self._buffer)
        self._buffer = ""
        if not self._after_call and self._space:
            events.append(Content(self._space))
        self._space = ""
        return events

    def _read(self, *, ended: bool) -> list[Event]:
        events: list[Event] = []
        while True:
            num_chars, opened = len(self._buffer), self._opened
            events += self._read_text() if opened is None else self._read_call(ended)
            if self._opened == opened and len(self._buffer) == num_chars:
                return events

    def _read_text(self) -> list[Event]:
        for mark in self._noise:
            self._buffer = self._buffer.replace(mark, "")
        found = [(at, -len(mark), mark) for mark in self._opens if (at := self._buffer.find(mark)) >= 0]
        if not found:
            at = len(self._buffer) - overlap(self._buffer, self._opens + self._noise)
            events = self._content(self._buffer[:at])
            self._buffer = self._buffer[at:]
            return events
        at, _, mark = min(found)
        events = self._content(self._buffer[:at])
        self._buffer = self._buffer[at + len(mark) :]
        self._enter(mark)
        return events

    def _enter(self, mark: str) -> None:
        self._opened = mark
        self._whole, self._arguments = JsonScan(), None

    def _read_call(self, ended: bool) -> list[Event]:
        if self._arguments is None:
            header = self._header.match(self._buffer)
            if header is None or header.end() == len(self._buffer):  # of the arguments there is nothing yet
                return self._without_header(ended)
            if header["name"] not in self._names:
                return self._give_up()
            if self._buffer[header.end()] != "{":
                is_object = self._buffer.lstrip().startswith("{")
                return self._without_header(ended) if is_object else self._give_up()
            self._arguments, self._begin, self._told = JsonScan(), header.end(), 0
            if self._is_certain:
                self._space = ""
                self._after_call = True
                return [CallBegins(header["name"]), *self._read_arguments(ended)]
        return self._read_arguments(ended)

    def _read_arguments(self, ended: bool) -> list[Event]:
        assert self._arguments is not None
        arguments = self._buffer[self._begin :]
        end = self._arguments.feed(arguments)
        events: list[Event] = []
        if self._is_certain:
            if new := arguments[self._told : end]:
                events.append(CallArguments(new))
            self._told = len(arguments) if end is None else end
            if end is None:
                if ended:
                    self._leave(len(self._buffer), more=False)
                return events
        if end is None:
            return events
        trailer = self._trailer.match(arguments, end)
        if not ended and _may_grow(trailer, arguments, end):
            return events
        if not self._is_certain:
            if not _is_object(arguments[:end]):
                return self._give_up()
            header = self._header.match(self._buffer)
            assert header is not None
            events = self._call(header["name"], arguments[:end])
        trailer = trailer or _NO_TRAILER.match(arguments, end)
        assert trailer is not None
        self._leave(self._begin + trailer.end(), more=_more(trailer))
        return events

    def _without_header(self, ended: bool) -> list[Event]:
        """Not yet, or not in the usual order: then there is an object that has a name and arguments."""
        begin = len(self._buffer) - len(self._buffer.lstrip())
        if self._buffer[begin : begin + 1] != "{":
            return self._give_up() if len(self._buffer) > _MAX_HEADER_CHARS else []
        end = self._whole.feed(self._buffer[begin:])
        if end is None or self._is_certain:
            return []
        call = _name_and_arguments(self._buffer[begin : begin + end])
        if call is None or call[0] not in self._names:
            return self._give_up()
        trailer = self._trailer.match(self._buffer, begin + end - 1)  # which has the brace that ends the object
        if not ended and _may_grow(trailer, self._buffer, begin + end):
            return []
        self._leave(begin + end if trailer is None else trailer.end(), more=_more(trailer))
        return self._call(*call)

    def _call(self, name: str, arguments: str) -> list[Event]:
        self._space = ""
        self._after_call = True
        return [CallBegins(name), CallArguments(arguments)]

    def _leave(self, num_chars: int, *, more: bool) -> None:
        self._buffer = self._buffer[num_chars:]
        if more:
            self._enter(self._opened or "")
        else:
            self._opened = None

    def _give_up(self) -> list[Event]:
        """It is no call: it is content, mark and all, up to the next mark."""
        mark, self._opened = self._opened or "", None
        marks = self._opens + self._noise
        next_at = min(
            (at for one in marks if (at := self._buffer.find(one)) >= 0),
            default=len(self._buffer) - overlap(self._buffer, marks),
        )
        events = self._content(mark + self._buffer[:next_at])
        self._buffer = self._buffer[next_at:]
        return events

    def _content(self, text: str) -> list[Event]:
        """White space is kept back until it is known what comes after it."""
        if self._after_call:
            text = text.lstrip()
        if not text:
            return []
        stripped = text.rstrip()
        if not stripped:
            self._space += text
            return []
        told = self._space + stripped
        self._space = text[len(stripped) :]
        self._after_call = False
        return [Content(told)]


def _may_grow(trailer: re.Match[str] | None, text: str, begin: int) -> bool:
    """Whether more text may make it a trailer, or one with a call behind it."""
    if trailer is None:
        return len(text) - begin < _MAX_TRAILER_CHARS
    return "more" in trailer.re.groupindex and not _more(trailer) and trailer.end() == len(text) and _is_open(trailer)


def _is_open(trailer: re.Match[str]) -> bool:
    """Not ended by a mark."""
    return trailer[0].rstrip().endswith("}")


def _more(trailer: re.Match[str] | None) -> bool:
    return trailer is not None and "more" in trailer.re.groupindex and trailer["more"] is not None


def _is_object(text: str) -> bool:
    return isinstance(_parsed(text), dict)


def _parsed(text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None


def _name_and_arguments(text: str) -> tuple[str, str] | None:
    parsed = _parsed(text)
    if not isinstance(parsed, dict) or not isinstance(parsed.get("name"), str):
        return None
    arguments = parsed.get("arguments", parsed.get("parameters", {}))
    if isinstance(arguments, str):  # some write JSON within JSON
        arguments = _parsed(arguments)
    return (parsed["name"], json.dumps(arguments, ensure_ascii=False)) if isinstance(arguments, dict) else None
