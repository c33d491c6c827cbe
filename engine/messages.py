"""What crosses between the server and the engine: small typed messages, encodable by msgspec, never pickled."""

from __future__ import annotations

from typing import Literal

import msgspec

from cache.expert_table import ExpertTable
from cache.histogram import HistogramStats
from cache.stats import CacheStats
from engine.errors import InvalidRequest
from engine.sampling_params import SamplingParams

FinishReason = Literal["stop", "length", "abort", "error"]

MAX_TRACE_TOKENS = 500_000  # of one recording


class AddRequest(msgspec.Struct, frozen=True, tag=True):
    """Server to engine: serve these prompt tokens."""

    request_id: str
    prompt_token_ids: list[int]
    params: SamplingParams


class AbortRequest(msgspec.Struct, frozen=True, tag=True):
    """Server to engine: nobody waits for this request any more."""

    request_id: str


class StartTrace(msgspec.Struct, frozen=True, tag=True):
    """Server to engine: record from now on which experts tokens are routed to, up to `max_tokens` of them."""

    trace_id: str
    max_tokens: int
    domain: str  # what the workload is called in the trace


class StopTrace(msgspec.Struct, frozen=True, tag=True):
    """Server to engine: that recording ends; with `discard` nobody wants it any more. Of an ended one no error."""

    trace_id: str
    discard: bool = False


class TraceRecorded(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """Engine to server: a recording has ended, and is the bytes of a file that `cache.trace` reads."""

    trace_id: str
    npz: bytes = b""
    num_tokens: int = 0
    num_requests: int = 0
    is_full: bool = False  # it ended at `max_tokens`
    error: str | None = None


class CheckIntegrity(msgspec.Struct, frozen=True, tag=True):
    """Server to engine: do your books add up?"""

    ask_id: str


class IntegrityChecked(msgspec.Struct, frozen=True, tag=True):
    """Engine to server: they do, between two steps, unless there is an `error`."""

    ask_id: str
    error: str | None = None


class AskExperts(msgspec.Struct, frozen=True, tag=True):
    """Server to engine: what is known of each expert?"""

    ask_id: int


class ExpertsTold(msgspec.Struct, frozen=True, tag=True):
    """Engine to server: that is; None where the model has no experts."""

    ask_id: int
    table: ExpertTable | None


CacheAction = Literal["reset", "warm", "pin"]


class ControlCache(msgspec.Struct, frozen=True, tag=True):
    """Server to engine: forget what is cached and not in use, bring experts up, or keep some from now on."""

    ask_id: str
    action: CacheAction
    experts: list[tuple[int, int]] | None = None  # (layer, expert); None: all there are


class CacheControlled(msgspec.Struct, frozen=True, tag=True):
    """Engine to server: that was done to so many experts, or was not for the reason in `error`."""

    ask_id: str
    num_experts: int = 0
    error: str | None = None


class TokenLogprob(msgspec.Struct, frozen=True):
    """One token with its natural-log probability; `token` is the token's own bytes (possibly half a character)."""

    token_id: int
    logprob: float  # NaN: of a prompt's first token, which nothing foretells
    token: bytes


class PositionLogprobs(msgspec.Struct, frozen=True):
    """The token chosen at one position and the `SamplingParams.logprobs` likeliest ones, best first."""

    chosen: TokenLogprob
    top: list[TokenLogprob]


class RequestOutput(msgspec.Struct, frozen=True, kw_only=True):
    """Engine to server: what is new of one request. Text and tokens are deltas; counts are totals so far.

    `text` never ends within a character or within what may become a stop string, so it can lag behind `token_ids`.
    The last output of a request has a `finish_reason`; with "error", `error` says what happened, and `error_param` and
    `error_code` are those of an `InvalidRequest` where the request's own words are the cause.
    """

    request_id: str
    text: str
    token_ids: list[int]
    num_prompt_tokens: int
    num_cached_tokens: int  # prompt tokens whose KV was found in the prefix cache
    num_output_tokens: int
    logprobs: list[PositionLogprobs] | None = None  # one per new token where asked for
    prompt_logprobs: list[PositionLogprobs] | None = None  # of further prompt tokens where asked for
    finish_reason: FinishReason | None = None
    stop_reason: int | str | None = None  # the stop id or stop string that ended it
    error: str | None = None
    error_param: str | None = None
    error_code: str | None = None

    @property
    def refusal(self) -> InvalidRequest | None:
        """The error, where it is the request's own."""
        if self.error_param is None:
            return None
        return InvalidRequest(self.error or "", param=self.error_param, code=self.error_code)


class AddedToken(msgspec.Struct, frozen=True):
    """A token that stands for one whole text; a special one is left out of answers."""

    token_id: int
    special: bool


class ModelInfo(msgspec.Struct, frozen=True, kw_only=True):
    """What the server may know of the loaded model."""

    name: str
    model_type: str
    max_model_len: int  # tokens, prompt and output together
    vocab_size: int
    has_chat_template: bool
    dtype: str
    expert_format: str | None  # None: the model has no experts
    chat_template: str | None = None  # its text; None: the model has none
    template_variables: frozenset[str] = frozenset()  # names that the template takes
    added_tokens: dict[str, AddedToken] = {}
    eos_token_ids: tuple[int, ...] = ()


StepPart = Literal["attention", "moe", "stall", "sample", "schedule"]

STEP_S = (
    *(50e-6, 100e-6, 250e-6, 500e-6, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05),
    *(0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0),
)
BATCH_TOKENS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192)

EngineState = Literal["stopped", "loading", "ready", "restarting", "draining", "dead"]


class EngineStats(msgspec.Struct, frozen=True, kw_only=True):
    """A snapshot of the engine's gauges and of its counters since the start (`*_total`)."""

    state: EngineState
    num_running: int = 0
    num_waiting: int = 0
    kv_blocks: int = 0
    kv_blocks_used: int = 0  # held by requests; blocks kept only for prefix reuse count as free
    prompt_tokens_total: int = 0
    computed_prompt_tokens_total: int = 0  # by steps; those found in the prefix cache are not among them
    output_tokens_total: int = 0
    prefix_queries_total: int = 0  # prompt tokens looked up in the prefix cache
    prefix_hits_total: int = 0
    preemptions_total: int = 0
    passes_over_total: int = 0  # of a request by one that fits the cached experts better
    steps_total: int = 0
    step_seconds_total: float = 0.0
    last_step_age_s: float = 0.0
    step_s: dict[StepPart, HistogramStats] = msgspec.field(default_factory=dict)  # of each step, by STEP_S
    batch_tokens: HistogramStats = HistogramStats()  # of each step, by BATCH_TOKENS
    expert_cache: CacheStats = CacheStats()
    restarts_total: int = 0  # of the engine's process, after it had died
    error: str | None = None  # why it is dead or restarting


class Stop(msgspec.Struct, frozen=True, tag=True):
    """Server to engine: end after this step, whatever is left to do."""


class Outputs(msgspec.Struct, frozen=True, tag=True):
    """Engine to server: what is new after one step."""

    outputs: list[RequestOutput]


class StatsTaken(msgspec.Struct, frozen=True, tag=True):
    """Engine to server: a snapshot, some of each second while it works and one when it comes to rest."""

    stats: EngineStats


class Failed(msgspec.Struct, frozen=True, tag=True):
    """Engine to server: it cannot go on, and ends."""

    error: str


ToEngine = AddRequest | AbortRequest | StartTrace | StopTrace | CheckIntegrity | AskExperts | ControlCache | Stop
FromEngine = Outputs | StatsTaken | TraceRecorded | IntegrityChecked | ExpertsTold | CacheControlled | Failed


def failed_output(request_id: str, error: str | InvalidRequest) -> RequestOutput:
    """The last output of a request of which nothing more can be told."""
    param, code = (error.param, error.code) if isinstance(error, InvalidRequest) else (None, None)
    return RequestOutput(
        request_id=request_id,
        text="",
        token_ids=[],
        num_prompt_tokens=0,
        num_cached_tokens=0,
        num_output_tokens=0,
        finish_reason="error",
        error=str(error),
        error_param=param,
        error_code=code,
    )
