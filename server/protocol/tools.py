"""Tools, the choice among them, and calls, in OpenAI's words."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Annotated, Any, Literal

import msgspec
from msgspec import UNSET, UnsetType
from pydantic import BaseModel, ConfigDict, Field

from engine.sampling_params import MAX_STRUCTURE_CHARS
from server.errors import BadRequest
from server.tools.family import Tool

Name = Annotated[str, Field(pattern=r"^[a-zA-Z0-9_-]{1,64}$")]
_MAX_TOOLS = 128


class _Part(BaseModel):
    model_config = ConfigDict(strict=True, extra="ignore", frozen=True)


class FunctionDefinition(_Part):
    name: Name
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class ToolDefinition(_Part):
    type: Literal["function"]
    function: FunctionDefinition

    def rendered(self) -> dict[str, Any]:
        """As chat templates take it."""
        function: dict[str, Any] = {"name": self.function.name, "description": self.function.description or ""}
        return {"type": "function", "function": {**function, "parameters": self.arguments_schema}}

    @property
    def arguments_schema(self) -> dict[str, Any]:
        return {"type": "object", "properties": {}} if self.function.parameters is None else self.function.parameters


class NamedFunction(_Part):
    name: str


class NamedTool(_Part):
    type: Literal["function"]
    function: NamedFunction


ToolChoice = Literal["none", "auto", "required"] | NamedTool


class CalledFunction(_Part):
    name: str
    arguments: str


class PastCall(_Part):
    """A call that an assistant's message of the conversation has."""

    id: str
    type: Literal["function"] = "function"
    function: CalledFunction

    def rendered(self, *, as_text: bool) -> dict[str, Any]:
        arguments: Any = self.function.arguments
        if not as_text:
            try:
                parsed = json.loads(arguments or "{}")
            except (ValueError, RecursionError):
                parsed = None  # what the model once wrote stays as it is
            arguments = parsed if isinstance(parsed, dict) else arguments
        function = {"name": self.function.name, "arguments": arguments}
        return {"id": self.id, "type": "function", "function": function}


class ToolUse(msgspec.Struct, frozen=True):
    """What a request asks of tools: those that may be called, and how much of that is enforced."""

    tools: list[Tool]
    must_call: bool
    is_named: bool
    parallel: bool

    @property
    def is_enforced(self) -> bool:
        return self.must_call or not self.parallel or any(tool.enforced for tool in self.tools)


def tool_use(tools: Sequence[ToolDefinition], choice: ToolChoice | None, *, parallel: bool | None) -> ToolUse | None:
    """None: there is nothing to call. Raises `BadRequest`."""
    if not tools:
        if choice not in (None, "none", "auto"):
            raise BadRequest("tool_choice needs tools", param="tool_choice")
        return None
    if len(tools) > _MAX_TOOLS:
        raise BadRequest(f"at most {_MAX_TOOLS} tools, got {len(tools)}", param="tools")
    names = [tool.function.name for tool in tools]
    if len({*names}) < len(names):
        raise BadRequest("two tools have the same name", param="tools")
    if sum(len(json.dumps(tool.arguments_schema)) for tool in tools) > MAX_STRUCTURE_CHARS:
        raise BadRequest(f"the tools' schemas have more than {MAX_STRUCTURE_CHARS} characters", param="tools")
    if choice == "none":
        return None
    named = choice.function.name if isinstance(choice, NamedTool) else None
    if named is not None and named not in names:
        raise BadRequest(f"tool_choice names {named[:100]!r}, which is not among the tools", param="tool_choice")
    must_call = choice == "required" or named is not None
    return ToolUse(
        [
            Tool(
                tool.function.name,
                tool.arguments_schema,
                f"tools[{i}].function",
                enforced=must_call or tool.function.strict is True,
            )
            for i, tool in enumerate(tools)
            if named in (None, tool.function.name)
        ],
        must_call=must_call,
        is_named=named is not None,
        parallel=parallel is not False and named is None,
    )


class FunctionCall(msgspec.Struct, frozen=True):
    name: str
    arguments: str


class ToolCall(msgspec.Struct, frozen=True):
    id: str
    function: FunctionCall
    type: str = "function"


class FunctionDelta(msgspec.Struct, frozen=True):
    arguments: str
    name: str | UnsetType = UNSET


class ToolCallDelta(msgspec.Struct, frozen=True):
    """The first one of a call has its id, type and name; the others more of its arguments."""

    index: int
    function: FunctionDelta
    id: str | UnsetType = UNSET
    type: str | UnsetType = UNSET
