"""Mistral, Mixtral: `[TOOL_CALLS][{"name": ..., "arguments": {...}}, ...]`; newer: `[TOOL_CALLS]name[ARGS]{...}`."""

from __future__ import annotations

import re
from collections.abc import Sequence

from server.tools.events import AnswerParser
from server.tools.family import Tool, Words, json_calls, text
from server.tools.marked import MarkedCalls

OPEN, ARGS, CALL_ID = "[TOOL_CALLS]", "[ARGS]", "[CALL_ID]"
_HEADER = re.compile(r'\s*\[?\s*\{\s*"name"\s*:\s*"(?P<name>[\w.-]{1,64})"\s*,\s*"(?:arguments|parameters)"\s*:\s*')
_TRAILER = re.compile(r'\s*(?:,\s*"id"\s*:\s*"[^"]*"\s*)?\}\s*(?:(?P<more>,)|\])')
_ARGS_HEADER = re.compile(r"\s*(?P<name>[\w.-]{1,64})(?:\[CALL_ID\]\w*)?\[ARGS\]\s*")


class MistralList:
    name = "mistral"
    marks: tuple[str, ...] = (OPEN,)
    begins_with: str | None = OPEN
    call_id_chars = 9
    arguments_as_text = False

    def is_of(self, template: str) -> bool:
        return OPEN in template and ARGS not in template

    def calls_rule(self, tools: Sequence[Tool], words: Words, *, parallel: bool) -> str:
        more = '(", " call)*' if parallel else ""
        calls = json_calls(tools, "arguments")
        return f'calls: "[" call {more} "]"\ncall: ({calls}) "}}"\n'

    def parser(self, tools: Sequence[Tool], *, is_certain: bool) -> AnswerParser:
        return MarkedCalls(tools, opens=(OPEN,), header=_HEADER, trailer=_TRAILER, is_certain=is_certain)


class MistralArgs:
    name = "mistral-args"
    marks: tuple[str, ...] = (OPEN, ARGS, CALL_ID)
    begins_with: str | None = OPEN
    call_id_chars = 9
    arguments_as_text = False

    def is_of(self, template: str) -> bool:
        return OPEN in template and ARGS in template

    def calls_rule(self, tools: Sequence[Tool], words: Words, *, parallel: bool) -> str:
        more = f"({words.mark(OPEN)} call)*" if parallel else ""
        calls = " | ".join(f"{text(tool.name)} {words.mark(ARGS)} {tool.arguments_rule}" for tool in tools)
        return f"calls: call {more}\ncall: {calls}\n"

    def parser(self, tools: Sequence[Tool], *, is_certain: bool) -> AnswerParser:
        no_trailer = re.compile("")
        return MarkedCalls(tools, opens=(OPEN,), header=_ARGS_HEADER, trailer=no_trailer, is_certain=is_certain)
