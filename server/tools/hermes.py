"""Hermes 2, Qwen 2.5 and 3, SmolLM3 and many others: `<tool_call>{"name": ..., "arguments": {...}}</tool_call>`."""

from __future__ import annotations

import re
from collections.abc import Sequence

from server.tools.events import AnswerParser
from server.tools.family import Tool, Words, json_calls
from server.tools.marked import MarkedCalls

OPEN, CLOSE = "<tool_call>", "</tool_call>"
# a list around them, and other names for arguments, are what small models write
HEADER = re.compile(r'\s*\[?\s*\{\s*"name"\s*:\s*"(?P<name>[\w.-]{1,64})"\s*,\s*"(?:arguments|parameters)"\s*:\s*')
_TRAILER = re.compile(r"\s*\}\s*(?:(?P<more>,)|(?:\]\s*)?</tool_call>)")


class Hermes:
    name = "hermes"
    marks: tuple[str, ...] = (OPEN, CLOSE)
    begins_with: str | None = OPEN
    call_id_chars = 24
    arguments_as_text = False

    def is_of(self, template: str) -> bool:
        return OPEN in template and "<function=" not in template

    def calls_rule(self, tools: Sequence[Tool], words: Words, *, parallel: bool) -> str:
        more = f'("\\n" {words.mark(OPEN)} call)*' if parallel else ""
        calls = json_calls(tools, "arguments")
        return f'calls: call {more}\ncall: "\\n" ({calls}) "}}\\n" {words.mark(CLOSE)}\n'

    def parser(self, tools: Sequence[Tool], *, is_certain: bool) -> AnswerParser:
        return MarkedCalls(tools, opens=(OPEN,), header=HEADER, trailer=_TRAILER, is_certain=is_certain)
