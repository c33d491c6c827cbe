"""The fields that completions and chat share, and how they become `SamplingParams`."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field
from pydantic_core import PydanticCustomError

from engine.sampling_params import SamplingParams
from server.errors import BadRequest

_INT32_MAX = 2**31 - 1

Count = Annotated[int, Field(ge=1, le=_INT32_MAX)]
CountOrZero = Annotated[int, Field(ge=0, le=_INT32_MAX)]
NumChoices = Annotated[int, Field(ge=1, le=128)]  # `n`
TokenId = Annotated[int, Field(ge=0, le=_INT32_MAX)]


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
    """null means the default, as in OpenAI's schema. Ranges are checked by `SamplingParams`."""

    model: str | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: Annotated[int, Field(ge=-1, le=_INT32_MAX)] | None = None  # -1 and 0: all
    min_p: float | None = None
    seed: int | None = None
    frequency_penalty: float | None = None
    presence_penalty: float | None = None
    repetition_penalty: float | None = None
    logit_bias: dict[str, float] | None = None
    stop: Annotated[tuple[str, ...], BeforeValidator(_stop_strings, json_schema_input_type=str | list[str] | None)] = ()
    stop_token_ids: list[TokenId] | None = None
    max_tokens: Count | None = None
    min_tokens: CountOrZero | None = None
    ignore_eos: bool | None = None
    skip_special_tokens: bool | None = None

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
            logit_bias=_logit_bias(self.logit_bias or {}),
            stop=self.stop,
            stop_token_ids=tuple(self.stop_token_ids or ()),
            ignore_eos=bool(self.ignore_eos),
            logprobs=logprobs,
            skip_special_tokens=self.skip_special_tokens is not False,
        )


def _logit_bias(bias: dict[str, float]) -> dict[int, float]:
    if not all(key.isascii() and key.isdigit() and len(key) <= 9 for key in bias):
        raise BadRequest("the keys of logit_bias must be token ids", param="logit_bias")
    return {int(key): value for key, value in bias.items()}
