"""How one request wants its tokens chosen and when to stop. Knows no tensors; validates itself."""

from __future__ import annotations

import math
from typing import Literal

import msgspec

from engine.errors import InvalidRequest

MAX_LOGPROBS = 20
MAX_STOP_STRINGS = 16
MAX_STRUCTURE_CHARS = 1024**2


class Structure(msgspec.Struct, frozen=True, kw_only=True):
    """What the whole text of an answer must be.

    `source` is by `kind` the text of a JSON schema, a regular expression (Rust's syntax, of the whole text), a JSON
    list of texts of which one is chosen, a Lark or GBNF grammar; or one of these as `engine.grammar.prepared`.
    """

    kind: Literal["json", "regex", "choice", "grammar", "llguidance"]
    source: str
    param: str  # what the client calls it
    prelude: str = ""  # Lark rules of which `prelude` matches what comes before, such as a thought
    nbytes: int = 0  # that it takes compiled, where this has been measured


class SamplingParams(msgspec.Struct, frozen=True, kw_only=True):
    """Sampling settings of one request; raises `InvalidRequest` naming the parameter on construction.

    Order of application to the logits: logit_bias, repetition / presence / frequency penalties, temperature,
    top_k, top_p, min_p. Log-probabilities are reported of the model's own distribution, before all of these.
    """

    max_tokens: int | None = None  # None: as many as the context holds; 0: the prompt is computed and no more
    min_tokens: int = 0  # end-of-sequence and stop ids are not sampled before
    temperature: float = 1.0  # 0: greedy
    top_p: float = 1.0
    top_k: int = 0  # 0: all
    min_p: float = 0.0
    seed: int | None = None  # None: drawn by the engine
    repetition_penalty: float = 1.0  # over prompt and output (Keskar et al. 2019, CTRL)
    presence_penalty: float = 0.0  # over output, as OpenAI
    frequency_penalty: float = 0.0
    logit_bias: dict[int, float] = {}  # msgspec copies mutable defaults
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    logprobs: int | None = None  # number of alternatives beside the chosen token; None: no log-probabilities
    prompt_logprobs: int | None = None  # the same for every prompt token but the first
    skip_special_tokens: bool = True
    # The text obeys it until it is cut by max_tokens, a stop string or a stop id. It ends with it too: min_tokens and
    # ignore_eos only keep it from ending where it could go on.
    structure: Structure | None = None

    def __post_init__(self) -> None:
        if self.max_tokens is not None and self.max_tokens < 0:
            raise InvalidRequest(f"max_tokens must not be negative, got {self.max_tokens}", param="max_tokens")
        if self.min_tokens < 0:
            raise InvalidRequest(f"min_tokens must not be negative, got {self.min_tokens}", param="min_tokens")
        if self.max_tokens is not None and self.min_tokens > self.max_tokens:
            raise InvalidRequest(
                f"min_tokens {self.min_tokens} is above max_tokens {self.max_tokens}", param="min_tokens"
            )
        _check_range("temperature", self.temperature, 0.0, 2.0)
        _check_range("top_p", self.top_p, 0.0, 1.0)
        if self.top_p == 0.0:
            raise InvalidRequest("top_p must be above 0; use temperature 0 for greedy decoding", param="top_p")
        if self.top_k < 0:
            raise InvalidRequest(f"top_k must not be negative (0 turns it off), got {self.top_k}", param="top_k")
        _check_range("min_p", self.min_p, 0.0, 1.0)
        if self.seed is not None and not -(2**63) <= self.seed < 2**63:
            raise InvalidRequest("seed must fit 64 bits", param="seed")
        _check_range("repetition_penalty", self.repetition_penalty, 0.01, 10.0)
        _check_range("presence_penalty", self.presence_penalty, -2.0, 2.0)
        _check_range("frequency_penalty", self.frequency_penalty, -2.0, 2.0)
        for token_id, bias in self.logit_bias.items():
            if token_id < 0:
                raise InvalidRequest(f"logit_bias names token {token_id}; ids are not negative", param="logit_bias")
            _check_range("logit_bias", bias, -100.0, 100.0)
        if len(self.stop) > MAX_STOP_STRINGS:
            raise InvalidRequest(f"at most {MAX_STOP_STRINGS} stop strings, got {len(self.stop)}", param="stop")
        if any(not text for text in self.stop):
            raise InvalidRequest("a stop string must not be empty", param="stop")
        if any(token_id < 0 for token_id in self.stop_token_ids):
            raise InvalidRequest("stop_token_ids must not be negative", param="stop_token_ids")
        for name, num in (("logprobs", self.logprobs), ("prompt_logprobs", self.prompt_logprobs)):
            if num is not None and not 0 <= num <= MAX_LOGPROBS:
                raise InvalidRequest(f"{name} must be between 0 and {MAX_LOGPROBS}, got {num}", param=name)

    @property
    def greedy(self) -> bool:
        return self.temperature == 0.0


def _check_range(name: str, value: float, low: float, high: float) -> None:
    if not math.isfinite(value) or not low <= value <= high:
        raise InvalidRequest(f"{name} must be between {low:g} and {high:g}, got {value}", param=name)
