"""The fields that completions and chat share, and how they become `SamplingParams`."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field
from pydantic_core import PydanticCustomError

from engine.sampling_params import MAX_STOP_STRINGS, SamplingParams
from server.errors import BadRequest
from server.protocol.structure import ResponseFormat, StructuredOutputs, structure_of

_INT32_MAX = 2**31 - 1


def _integral(value: Any) -> Any:
    """JSON does not tell 5 from 5.0, and neither do the clients of some languages."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


Integer = Annotated[int, BeforeValidator(_integral, json_schema_input_type=int)]
Count = Annotated[Integer, Field(ge=1, le=_INT32_MAX)]
CountOrZero = Annotated[Integer, Field(ge=0, le=_INT32_MAX)]
Penalty = Annotated[float, Field(ge=-2, le=2)]
BiasedToken = Annotated[str, Field(pattern="^[0-9]{1,9}$")]
_LogitBias = Annotated[
    dict[BiasedToken, Annotated[float, Field(ge=-100, le=100)]],
    Field(json_schema_extra={"additionalProperties": False}),
]
StopString = Annotated[str, Field(min_length=1)]
_StopInput = StopString | Annotated[list[StopString], Field(max_length=MAX_STOP_STRINGS)] | None
NumChoices = Annotated[Integer, Field(ge=1, le=128)]  # `n`
TokenId = Annotated[int, Field(ge=0, le=_INT32_MAX)]  # strict: prompts have very many


class Body(BaseModel):
    """Base of all request bodies: no coercion, finite numbers, unknown fields kept aside for `read_body` to judge."""

    model_config = ConfigDict(strict=True, extra="allow", allow_inf_nan=False, frozen=True)


class StreamOptions(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid", frozen=True)

    include_usage: bool | None = None
    include_obfuscation: bool | None = None  # padding against eavesdroppers; without effect here


def _stop_strings(value: Any) -> Any:
    if value is None:
        return ()
    if isinstance(value, str):
        return (value,)
    if isinstance(value, (list, tuple)) and all(isinstance(text, str) for text in value):
        return tuple(value)
    raise PydanticCustomError("stop_type", "must be a string or a list of strings")


class SamplingBody(Body):
    """null means the default, as in OpenAI's schema."""

    model: str | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    top_k: Annotated[Integer, Field(ge=-1, le=_INT32_MAX)] | None = None  # -1 and 0: all
    min_p: Annotated[float, Field(ge=0, le=1)] | None = None
    seed: Annotated[Integer, Field(ge=-(2**63), lt=2**63)] | None = None
    frequency_penalty: Penalty | None = None
    presence_penalty: Penalty | None = None
    repetition_penalty: Annotated[float, Field(ge=0.01, le=10)] | None = None
    logit_bias: _LogitBias | None = None
    stop: Annotated[tuple[StopString, ...], BeforeValidator(_stop_strings, json_schema_input_type=_StopInput)] = ()
    stop_token_ids: list[TokenId] | None = None
    max_tokens: Count | None = None
    min_tokens: CountOrZero | None = None
    ignore_eos: bool | None = None
    skip_special_tokens: bool | None = None
    response_format: ResponseFormat | None = None
    structured_outputs: StructuredOutputs | None = None

    @property
    def include_usage(self) -> bool:
        """Raises `BadRequest` for stream options without a stream."""
        if self.stream_options is None:
            return False
        if not self.stream:
            raise BadRequest("stream_options needs stream to be true", param="stream_options")
        return bool(self.stream_options.include_usage)

    def sampling_params(self, *, max_tokens: int | None, logprobs: int | None, max_stop_strings: int) -> SamplingParams:
        """Raises `BadRequest` or `InvalidRequest` naming the parameter."""
        if len(self.stop) > max_stop_strings:
            raise BadRequest(f"at most {max_stop_strings} stop strings, got {len(self.stop)}", param="stop")
        return SamplingParams(
            max_tokens=max_tokens,
            min_tokens=self.min_tokens or 0,
            temperature=1.0 if self.temperature is None else self.temperature,
            top_p=1.0 if self.top_p is None else self.top_p,
            top_k=max(0, self.top_k or 0),
            min_p=self.min_p or 0.0,
            seed=self.seed,
            repetition_penalty=1.0 if self.repetition_penalty is None else self.repetition_penalty,
            presence_penalty=self.presence_penalty or 0.0,
            frequency_penalty=self.frequency_penalty or 0.0,
            logit_bias={int(token_id): bias for token_id, bias in (self.logit_bias or {}).items()},
            stop=self.stop,
            stop_token_ids=tuple(self.stop_token_ids or ()),
            ignore_eos=bool(self.ignore_eos),
            logprobs=logprobs,
            skip_special_tokens=self.skip_special_tokens is not False,
            structure=structure_of(self.response_format, self.structured_outputs),
        )
