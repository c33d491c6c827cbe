"""What a family of models' way to call functions consists of, and the words its grammars are written in."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import msgspec

from engine.json_schema import json_rule
from engine.messages import AddedToken
from server.tools.events import AnswerParser


class Tool(msgspec.Struct, frozen=True):
    """A function that can be called."""

    name: str
    parameters: dict[str, Any]  # JSON schema of its arguments
    param: str  # what the client calls it
    enforced: bool = True  # the schema; otherwise any object will do

    @property
    def schema(self) -> dict[str, Any]:
        return self.parameters if self.enforced else {}

    @property
    def arguments_rule(self) -> str:
        """Raises `InvalidRequest` naming what cannot be enforced."""
        schema = self.schema
        # arguments are an object, whether or not the schema says so
        return json_rule({"type": "object", **schema} if "type" not in schema else schema, f"{self.param}.parameters")


class ToolFamily(Protocol):
    """One way to write calls. `marks` are texts of its own; some tokenizers have them as special tokens."""

    name: str
    marks: tuple[str, ...]
    call_id_chars: int
    """Templates may want ids of one length."""
    begins_with: str | None
    """The mark that nothing but a call begins with; None: it takes the whole answer to tell."""
    arguments_as_text: bool
    """How the template wants those of earlier calls: as JSON text, or as the object that this says."""

    def is_of(self, template: str) -> bool:
        """Whether a chat template that has `tools` writes and reads calls this way."""

    def calls_rule(self, tools: Sequence[Tool], words: Words, *, parallel: bool) -> str:
        """Lark rules of which `calls` matches one call, or with `parallel` one or more; without the first mark.

        Raises `InvalidRequest`.
        """

    def parser(self, tools: Sequence[Tool], *, is_certain: bool) -> AnswerParser:
        """`is_certain`: a grammar has seen to it that calls are well formed; their arguments are told as they come."""


class Words:
    """Marks as llguidance's grammars write them: a token of its own where the tokenizer has one."""

    def __init__(self, added_tokens: Mapping[str, AddedToken]) -> None:
        self._added_tokens = added_tokens

    def token(self, mark: str) -> int | None:
        """The token that alone can be this mark."""
        token = self._added_tokens.get(mark)
        # as llguidance tells them apart
        return token.token_id if token and (token.special or (mark[:1] == "<" and mark[-1:] == ">")) else None

    def mark(self, mark: str) -> str:
        token_id = self.token(mark)
        return text(mark) if token_id is None else f"<[{token_id}]>"

    def others(self, but: Sequence[str], eos_token_ids: Sequence[int]) -> str | None:
        """Any one of the other tokens that are no text; None: there is none."""
        left_out = {self.token(mark) for mark in but} | {*eos_token_ids}
        ids = sorted(
            token_id
            for mark in self._added_tokens
            if (token_id := self.token(mark)) is not None and token_id not in left_out
        )
        return f"<[{','.join(map(str, ids))}]>" if ids else None


def text(literal: str) -> str:
    """A text as a grammar writes it."""
    return json.dumps(literal, ensure_ascii=False)


def json_calls(tools: Sequence[Tool], arguments_key: str) -> str:
    """One of the tools' calls as an object of a name and arguments, without the brace that ends it."""
    calls = []
    for tool in tools:
        begin = text('{"name": "' + tool.name + '", "' + arguments_key + '": ')
        calls.append(f"{begin} {tool.arguments_rule}")
    return " | ".join(calls)
