"""`/v1/chat/completions`: its body, its answer and its chunks."""

from __future__ import annotations

from typing import Annotated, Any, Literal

import msgspec
from msgspec import UNSET, UnsetType
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, field_validator, model_validator
from pydantic_core import PydanticCustomError

from engine.messages import FinishReason
from engine.sampling_params import MAX_LOGPROBS
from server.errors import BadRequest
from server.protocol.fields import Count, NumChoices, SamplingBody
from server.protocol.logprobs import ChatLogprobs
from server.protocol.tools import PastCall, ToolCall, ToolCallDelta, ToolChoice, ToolDefinition
from server.protocol.usage import Usage


def _joined_text(value: Any) -> Any:
    """A string, or text parts joined by line breaks; None stays None."""
    if value is None or isinstance(value, str):
        return value
    if not isinstance(value, (list, tuple)):
        raise PydanticCustomError("content_type", "must be a string or a list of text parts")
    texts: list[str] = []
    for part in value:
        if not isinstance(part, dict):
            raise PydanticCustomError("content_part", "every part must be an object")
        if part.get("type") != "text":
            raise PydanticCustomError("content_part", "only parts of type text are supported")
        if not isinstance(part.get("text"), str):
            raise PydanticCustomError("content_part", "a text part must have a string `text`")
        texts.append(part["text"])
    return "\n".join(texts)


class Message(BaseModel):
    """Other fields, such as those an SDK's answer object carries when it is sent back, are passed over."""

    model_config = ConfigDict(strict=True, extra="ignore", frozen=True)

    role: Literal["developer", "system", "user", "assistant", "tool"]
    content: Annotated[
        str | None, BeforeValidator(_joined_text, json_schema_input_type=str | list[dict[str, str]] | None)
    ] = None
    name: str | None = None
    tool_calls: list[PastCall] | None = None
    tool_call_id: str | None = None
    reasoning: str | None = None
    reasoning_content: str | None = None
    function_call: Any | None = None

    @field_validator("role", mode="before")
    @classmethod
    def _no_functions(cls, value: Any) -> Any:
        if value == "function":
            raise PydanticCustomError("role", "function messages are not supported; use tool messages")
        return value

    @model_validator(mode="after")
    def _has_content(self) -> Message:
        if self.function_call:
            raise PydanticCustomError("function_call", "function_call is not supported; use tool_calls")
        if self.tool_calls and self.role != "assistant":
            raise PydanticCustomError("tool_calls", "only assistant messages have tool calls")
        if self.role == "tool" and self.tool_call_id is None:
            raise PydanticCustomError("tool_call_id", "a tool message needs the tool_call_id that it answers")
        if self.content is None and self.role != "assistant":
            raise PydanticCustomError("content_missing", "a {role} message needs content", {"role": self.role})
        return self

    def rendered(self, *, arguments_as_text: bool = False) -> dict[str, Any]:
        """The message as chat templates take it."""
        message: dict[str, Any] = {
            "role": "system" if self.role == "developer" else self.role,
            "content": self.content or "",
        }
        if self.name is not None:
            message["name"] = self.name
        if self.tool_calls:
            message["tool_calls"] = [call.rendered(as_text=arguments_as_text) for call in self.tool_calls]
        if self.role == "tool":
            message["tool_call_id"] = self.tool_call_id
        thought = self.reasoning_content or self.reasoning
        if thought and self.role == "assistant":
            message["reasoning_content"] = thought
        return message


Effort = Literal["none", "minimal", "low", "medium", "high", "xhigh"]


class ChatRequest(SamplingBody):
    messages: Annotated[list[Message], Field(min_length=1)]
    max_completion_tokens: Count | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=MAX_LOGPROBS)] | None = None
    n: NumChoices | None = None
    tools: list[ToolDefinition] | None = None
    tool_choice: ToolChoice | None = None
    parallel_tool_calls: bool | None = None
    reasoning_effort: Effort | None = None
    chat_template_kwargs: dict[str, str | int | float | bool | None] | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    add_special_tokens: Literal[False] | None = None  # the template writes them

    @property
    def output_limit(self) -> int | None:
        return self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens

    @property
    def num_logprobs(self) -> int | None:
        """Alternatives for each token; None without log-probabilities. Raises `BadRequest` for a contradiction."""
        if self.logprobs:
            return self.top_logprobs or 0
        if self.top_logprobs:
            raise BadRequest("top_logprobs needs logprobs to be true", param="top_logprobs")
        return None


ChatFinishReason = FinishReason | Literal["tool_calls"]


class ChatMessage(msgspec.Struct, frozen=True):
    """`reasoning` is there, under both names that clients know, where the model can reason."""

    role: str
    content: str | None
    refusal: None = None
    annotations: list[None] = []
    tool_calls: list[ToolCall] | UnsetType = UNSET
    reasoning: str | UnsetType | None = UNSET
    reasoning_content: str | UnsetType | None = UNSET


class ChatChoice(msgspec.Struct, frozen=True):
    index: int
    message: ChatMessage
    logprobs: ChatLogprobs | None
    finish_reason: ChatFinishReason | None
    stop_reason: int | str | None


class ChatCompletion(msgspec.Struct, frozen=True, kw_only=True):
    id: str
    object: str = "chat.completion"
    created: int
    model: str
    system_fingerprint: str
    choices: list[ChatChoice]
    usage: Usage


class ChatDelta(msgspec.Struct, frozen=True):
    role: str | UnsetType = UNSET
    content: str | UnsetType = UNSET
    tool_calls: list[ToolCallDelta] | UnsetType = UNSET
    reasoning: str | UnsetType = UNSET
    reasoning_content: str | UnsetType = UNSET


class ChatChunkChoice(msgspec.Struct, frozen=True):
    index: int
    delta: ChatDelta
    logprobs: ChatLogprobs | None = None
    finish_reason: ChatFinishReason | None = None
    stop_reason: int | str | UnsetType | None = UNSET


class ChatChunk(msgspec.Struct, frozen=True, kw_only=True):
    """`usage` is absent unless asked for, and then null in all chunks but the last."""

    id: str
    object: str = "chat.completion.chunk"
    created: int
    model: str
    system_fingerprint: str
    choices: list[ChatChunkChoice]
    usage: Usage | UnsetType | None = UNSET
