"""Qwen3-Coder: `<tool_call><function=name><parameter=key>value</parameter></function></tool_call>`."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from typing import Any

from engine.errors import InvalidRequest
from engine.json_schema import enforceable, json_rule
from server.tools.events import AnswerParser, CallArguments, CallBegins, Content, Event, overlap
from server.tools.family import Tool, Words, text

_OPEN, _CLOSE = "<tool_call>", "</tool_call>"
_CALL = re.compile(
    r"(?:<tool_call>\s*)?<function=(?P<name>[\w.-]{1,64})>(?P<body>.*?)</function>(?:\s*</tool_call>)?", re.DOTALL
)
_PARAMETER = re.compile(r"<parameter=(?P<key>[^>\n]*)>\n?(?P<value>.*?)\n?</parameter>", re.DOTALL)
_END = text("\n</parameter>\n")
_MAX_CLOSING_CHARS = 20


class QwenCoder:
    name = "qwen-coder"
    marks: tuple[str, ...] = (_OPEN, _CLOSE)
    begins_with: str | None = _OPEN
    call_id_chars = 24
    arguments_as_text = False

    def is_of(self, template: str) -> bool:
        return "<function=" in template and "<parameter=" in template

    def calls_rule(self, tools: Sequence[Tool], words: Words, *, parallel: bool) -> str:
        more = f'("\\n" {words.mark(_OPEN)} call)*' if parallel else ""
        rules = [f"calls: call {more}"]
        calls = []
        for i, tool in enumerate(tools):
            schema = enforceable(tool.schema, f"{tool.param}.parameters")
            given = []
            for j, (key, value) in enumerate(schema.get("properties", {}).items()):
                rules.append(
                    f"parameter_{i}_{j}: {text('<parameter=' + key + '>')} {_value_rule(key, value, schema, tool)}"
                )
                given.append(f"parameter_{i}_{j}" + ("" if key in schema.get("required", ()) else "?"))
            begin, end = text("\n<function=" + tool.name + ">\n"), text("</function>\n")
            calls.append(f"{begin} {' '.join(given)} {end}")
        rules.append(f"call: ({' | '.join(calls)}) {words.mark(_CLOSE)}")
        rules.append("free_text[lazy]: /\\n(.|\\n)*\\n<\\/parameter>\\n/")
        return "\n".join(rules) + "\n"

    def parser(self, tools: Sequence[Tool], *, is_certain: bool) -> AnswerParser:
        return _Parser(tools)


def _is_free_text(schema: Any) -> bool:
    return isinstance(schema, dict) and schema.get("type") == "string" and not ({"enum", "const"} & schema.keys())


def _value_rule(key: str, schema: Any, root: dict[str, Any], tool: Tool) -> str:
    param = f"{tool.param}.parameters"
    if _is_free_text(schema):
        wrong = schema.keys() - {"type"}
        if wrong:
            raise InvalidRequest(f"{min(wrong)!r} of the text {key!r} cannot be enforced for this model", param=param)
        return "free_text"
    choices = schema.get("enum", [schema["const"]] if "const" in schema else None) if isinstance(schema, dict) else None
    if choices is not None and all(isinstance(choice, str) for choice in choices):
        return '"\\n" (' + " | ".join(map(text, choices)) + f") {_END}"
    definitions = {name: root[name] for name in ("$defs", "definitions") if name in root}
    rule = json_rule({**schema, **definitions} if isinstance(schema, dict) else schema, param)
    return f'"\\n" {rule} {_END}'


class _Parser:
    """A call is told when it is complete: before, its arguments are no JSON."""

    def __init__(self, tools: Sequence[Tool]) -> None:
        self._tools = {tool.name: tool for tool in tools}
        self._buffer = ""
        self._after_call = False

    def push(self, text: str) -> list[Event]:
        self._buffer += text
        return self._read(ended=False)

    def finish(self) -> list[Event]:
        return self._read(ended=True)

    def _read(self, *, ended: bool) -> list[Event]:
        events: list[Event] = []
        while (found := _CALL.search(self._buffer)) is not None:
            is_closed = found[0].endswith(_CLOSE)
            if not is_closed and not ended and len(self._buffer) - found.end() < _MAX_CLOSING_CHARS:
                break
            before, call = self._buffer[: found.start()], self._events_of(found)
            events += self._content(before.rstrip() if call else before + found[0])
            events += call
            self._after_call = bool(call)
            self._buffer = self._buffer[found.end() :]
        if ended:
            events += self._content(self._buffer)
            self._buffer = ""
        elif found is None:
            events += self._certain_content()
        return events

    def _certain_content(self) -> list[Event]:
        """Up to where a call may have begun, or white space before one."""
        starts = [at for mark in (_OPEN, "<function=") if (at := self._buffer.find(mark)) >= 0]
        end = min(starts, default=len(self._buffer) - overlap(self._buffer, (_OPEN, "<function=")))
        end = len(self._buffer[:end].rstrip())
        content, self._buffer = self._buffer[:end], self._buffer[end:]
        return self._content(content)

    def _content(self, text: str) -> list[Event]:
        if self._after_call:
            text = text.lstrip()
        if not text:
            return []
        self._after_call = False
        return [Content(text)]

    def _events_of(self, found: re.Match[str]) -> list[Event]:
        tool = self._tools.get(found["name"])
        if tool is None:
            return []
        properties = tool.parameters.get("properties", {})
        arguments = {
            one["key"]: _value(one["value"], properties.get(one["key"])) for one in _PARAMETER.finditer(found["body"])
        }
        return [CallBegins(tool.name), CallArguments(json.dumps(arguments, ensure_ascii=False))]


def _value(text: str, schema: Any) -> Any:
    """Text where the schema has text, else JSON if it is."""
    if isinstance(schema, dict) and schema.get("type") == "string":
        return text
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return text
