"""`/v1/completions`: its body, its answer and its chunks."""

from __future__ import annotations

from typing import Annotated, Any, TypeVar

import msgspec
from msgspec import UNSET, UnsetType
from pydantic import BeforeValidator, Field
from pydantic_core import PydanticCustomError

from engine.messages import FinishReason
from engine.sampling_params import MAX_LOGPROBS
from server.errors import BadRequest
from server.protocol.fields import CountOrZero, Integer, NumChoices, SamplingBody, TokenId
from server.protocol.logprobs import CompletionLogprobs
from server.protocol.usage import Usage

DEFAULT_MAX_TOKENS = 16  # as OpenAI's

Prompt = str | list[int]

_Text = Annotated[str, Field(min_length=1)]
_TokenIds = Annotated[list[TokenId], Field(min_length=1)]
_T = TypeVar("_T")
_Many = Annotated[list[_T], Field(min_length=1)]


def _prompts(value: Any) -> list[Prompt]:
    """One or many prompts, as text or as ids, become a list of prompts."""
    if isinstance(value, str):
        return [value]
    if not isinstance(value, (list, tuple)):
        raise PydanticCustomError("prompt_type", "must be a string, a list of strings, or token ids")
    if not value:
        raise PydanticCustomError("prompt_empty", "must not be empty")
    if all(type(item) is int for item in value):
        return [list(value)]
    if all(isinstance(item, str) for item in value):
        return list(value)
    if all(isinstance(item, (list, tuple)) and all(type(token) is int for token in item) for item in value):
        return [list(item) for item in value]
    raise PydanticCustomError("prompt_type", "must be all strings, all token ids, or all lists of token ids")


class CompletionRequest(SamplingBody):
    prompt: Annotated[
        list[Prompt],
        BeforeValidator(_prompts, json_schema_input_type=_Text | _Many[_Text] | _TokenIds | _Many[_TokenIds]),
    ]
    max_tokens: CountOrZero | None = None
    n: NumChoices | None = None
    best_of: NumChoices | None = None
    echo: bool | None = None
    logprobs: Annotated[Integer, Field(ge=0, le=MAX_LOGPROBS)] | None = None

    @property
    def num_choices(self) -> int:
        """Of each prompt. Raises `BadRequest` for a `best_of` that would throw some away."""
        n = self.n or 1
        if self.best_of is not None and self.best_of != n:
            raise BadRequest(f"best_of is only supported as equal to n, which is {n}", param="best_of")
        return n

    @property
    def output_limit(self) -> int:
        return DEFAULT_MAX_TOKENS if self.max_tokens is None else self.max_tokens


class CompletionChoice(msgspec.Struct, frozen=True):
    index: int
    text: str
    logprobs: CompletionLogprobs | None = None
    finish_reason: FinishReason | None = None
    stop_reason: int | str | None = None


class Completion(msgspec.Struct, frozen=True, kw_only=True):
    """The answer and, with `usage` as in `ChatChunk`, each chunk."""

    id: str
    object: str = "text_completion"
    created: int
    model: str
    system_fingerprint: str
    choices: list[CompletionChoice]
    usage: Usage | UnsetType | None = UNSET
