"""DeepSeek V3, R1 and V3.1: calls between marks of their own, the name before the arguments."""

from __future__ import annotations

import re
from collections.abc import Sequence

from server.tools.events import AnswerParser
from server.tools.family import Tool, Words, text
from server.tools.marked import MarkedCalls

_ALL, _ALL_END = "<｜tool▁calls▁begin｜>", "<｜tool▁calls▁end｜>"
_ONE, _ONE_END = "<｜tool▁call▁begin｜>", "<｜tool▁call▁end｜>"
_SEP = "<｜tool▁sep｜>"
_NAME = r"(?P<name>[\w.-]{1,64})"
_TRAILER = re.compile(rf"\s*(?:```)?\s*{_ONE_END}")


class DeepSeek:
    name = "deepseek"
    header = re.compile(rf"\s*function{_SEP}{_NAME}\n```json\n")
    marks: tuple[str, ...] = (_ALL, _ALL_END, _ONE, _ONE_END, _SEP)
    begins_with: str | None = _ALL
    call_id_chars = 24
    arguments_as_text = True

    def is_of(self, template: str) -> bool:
        return _ONE in template and "```json" in template

    def _call(self, tool: Tool, words: Words) -> str:
        name, end = text(tool.name + "\n```json\n"), text("\n```")
        return f'"function" {words.mark(_SEP)} {name} {tool.arguments_rule} {end}'

    def calls_rule(self, tools: Sequence[Tool], words: Words, *, parallel: bool) -> str:
        more = '("\\n" call)*' if parallel else ""
        calls = " | ".join(self._call(tool, words) for tool in tools)
        return f"calls: call {more} {words.mark(_ALL_END)}\ncall: {words.mark(_ONE)} ({calls}) {words.mark(_ONE_END)}\n"

    def parser(self, tools: Sequence[Tool], *, is_certain: bool) -> AnswerParser:
        noise = (_ALL, _ALL_END)
        return MarkedCalls(
            tools, opens=(_ONE,), header=self.header, trailer=_TRAILER, is_certain=is_certain, noise=noise
        )


class DeepSeekV31(DeepSeek):
    name = "deepseek-v3.1"
    header = re.compile(rf"\s*{_NAME}{_SEP}\s*")

    def is_of(self, template: str) -> bool:
        return _ONE in template and "```json" not in template

    def _call(self, tool: Tool, words: Words) -> str:
        return f"{text(tool.name)} {words.mark(_SEP)} {tool.arguments_rule}"
