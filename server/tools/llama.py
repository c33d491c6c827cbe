"""Llama 3.1 to 3.3: the whole answer is `{"name": ..., "parameters": {...}}`, some after `<|python_tag|>`."""

from __future__ import annotations

import re
from collections.abc import Sequence

from server.tools.events import AnswerParser, Content, Event
from server.tools.family import Tool, Words, json_calls
from server.tools.marked import MarkedCalls

_TAG = "<|python_tag|>"
_HEADER = re.compile(r'\s*\{\s*"name"\s*:\s*"(?P<name>[\w.-]{1,64})"\s*,\s*"(?:arguments|parameters)"\s*:\s*')
_TRAILER = re.compile(r"\s*\}\s*(?P<more>;)?")


class Llama:
    name = "llama"
    marks: tuple[str, ...] = (_TAG,)
    begins_with: str | None = None
    call_id_chars = 24
    arguments_as_text = False

    def is_of(self, template: str) -> bool:
        return '"parameters"' in template and ("<|eot_id|>" in template or _TAG in template)

    def calls_rule(self, tools: Sequence[Tool], words: Words, *, parallel: bool) -> str:
        """The models were taught one call at a time, of which the first mark is part."""
        calls = json_calls(tools, "parameters")
        return f'calls: ({calls}) "}}"\n'

    def parser(self, tools: Sequence[Tool], *, is_certain: bool) -> AnswerParser:
        return _WholeAnswer(MarkedCalls(tools, opens=(_TAG,), header=_HEADER, trailer=_TRAILER, is_certain=is_certain))


class _WholeAnswer:
    """A brace that begins the answer opens a call as the mark does."""

    def __init__(self, inner: MarkedCalls) -> None:
        self._inner = inner
        self._start: str | None = ""  # white space; None: something else was there

    def push(self, text: str) -> list[Event]:
        if self._start is not None:
            self._start += text
            if not self._start.strip():
                return []
            text, self._start = self._start, None
            if text.lstrip().startswith("{"):
                text = _TAG + text
        return _without_mark(self._inner.push(text))

    def finish(self) -> list[Event]:
        events: list[Event] = [Content(self._start)] if self._start else []
        return events + _without_mark(self._inner.finish())


def _without_mark(events: list[Event]) -> list[Event]:
    """The mark of what turned out to be no call was not the model's, or no text."""
    return [Content(event.text.replace(_TAG, "")) if isinstance(event, Content) else event for event in events]
