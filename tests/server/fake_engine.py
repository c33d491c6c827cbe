"""An engine that plays a script: no model, no torch, the same face as `AsyncEngine`."""

from __future__ import annotations

import asyncio
import contextlib
import math
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from cache.expert_table import ExpertTable
from engine.admission import check_request
from engine.errors import EngineOverloaded, InvalidRequest, RecordingInProgress
from engine.messages import (
    EngineState,
    EngineStats,
    FinishReason,
    ModelInfo,
    PositionLogprobs,
    RequestOutput,
    TokenLogprob,
    TraceRecorded,
)
from engine.sampling_params import SamplingParams

INFO = ModelInfo(
    name="fake",
    model_type="fake_moe",
    max_model_len=64,
    vocab_size=256,
    has_chat_template=True,
    dtype="float32",
    expert_format="int8",
    chat_template="{% for message in messages %}{{ message.content }}{% endfor %}",
    template_variables=frozenset({"messages", "add_generation_prompt"}),
)


@dataclass
class Token:
    """One token of a script: its text (may be empty), its own bytes, how long it takes."""

    text: str
    raw: bytes | None = None
    delay_s: float = 0.0

    @property
    def bytes(self) -> bytes:
        return self.text.encode() if self.raw is None else self.raw


@dataclass
class Script:
    """What the engine does with a prompt."""

    tokens: list[Token] = field(default_factory=lambda: [Token("Par"), Token("is"), Token(".")])
    refusal: Exception | None = None  # raised by the first __anext__
    failure: Exception | None = None  # raised after the tokens
    finish_reason: FinishReason = "stop"
    error: str | InvalidRequest | None = None
    stop_reason: int | str | None = None
    num_cached_tokens: int = 0


class FakeEngine:
    """A token is a byte of text. `script` may be a function of the prompt."""

    def __init__(self, script: Script | Callable[[list[int]], Script] | None = None) -> None:
        self.script = script or Script()
        self.model = INFO
        self.prompt_end = ""  # what the template writes at the end
        self.rendering: dict[str, Any] = {}  # the latest
        self.state: EngineState = "ready"
        self.stats_to_tell = EngineStats(state="ready")
        self.seen: list[tuple[str, list[int], SamplingParams]] = []
        self.messages: list[dict[str, Any]] = []
        self.num_open = 0  # generators started and not ended
        self.num_aborted = 0
        self.controlled: list[tuple[str, Sequence[tuple[int, int]] | None]] = []
        self.aborted: list[str] = []
        self.start_error: Exception | None = None
        self.full: EngineOverloaded | None = None
        self.start_s = 0.0
        self.stopped_with: float | None = None
        self.recorded = TraceRecorded(trace_id="t", npz=b"PK", num_tokens=7, num_requests=2)
        self.recordings: list[tuple[float, int, str]] = []  # asked for: seconds, tokens, domain
        self.integrity: str | None = None  # what does not add up
        self.trace_ends: asyncio.Event | None = None  # of what is being recorded
        self.table: ExpertTable | None = None

    @property
    def info(self) -> ModelInfo:
        return self.model

    async def start(self) -> None:
        self.state = "loading"
        await asyncio.sleep(self.start_s)
        if self.start_error is not None:
            self.state = "dead"
            raise self.start_error
        self.state = "ready"

    async def stop(self, *, drain_s: float = 0.0) -> None:
        self.stopped_with = drain_s
        deadline_s = asyncio.get_running_loop().time() + drain_s
        while self.num_open and asyncio.get_running_loop().time() < deadline_s:
            await asyncio.sleep(0.01)
        self.state = "stopped"

    def check_room(self) -> None:
        if self.full is not None:
            raise self.full

    async def render_chat(
        self, messages: list[dict[str, Any]], *, add_generation_prompt: bool = True, **rendering: Any
    ) -> list[int]:
        if any("\x00" in message["content"] for message in messages):
            raise InvalidRequest("the chat template failed", param="messages")
        self.messages = messages
        self.rendering = {"add_generation_prompt": add_generation_prompt, **rendering}
        text = "".join(f"<{message['role']}>{message['content']}" for message in messages)
        return await self.encode(text + ("<assistant>" if add_generation_prompt else "") + self.prompt_end)

    async def encode(self, text: str) -> list[int]:
        return list(text.encode())

    async def decode(self, token_ids: list[int]) -> str:
        if any(token_id >= self.model.vocab_size for token_id in token_ids):
            raise InvalidRequest("no such token", param="tokens")
        return bytes(token_ids).decode("utf-8", "replace")

    async def generate(
        self, request_id: str, prompt_token_ids: list[int], params: SamplingParams
    ) -> AsyncIterator[RequestOutput]:
        script = self.script(prompt_token_ids) if callable(self.script) else self.script
        self.seen.append((request_id, prompt_token_ids, params))
        if script.refusal is not None:
            raise script.refusal
        check_request(self.model, prompt_token_ids, params)
        self.num_open += 1
        finished = False
        try:
            tokens = script.tokens[: params.max_tokens]
            prompt_logprobs = _prompt_logprobs(prompt_token_ids, params)
            if params.max_tokens == 0 and script.failure is None:
                finished = True
                yield RequestOutput(
                    request_id=request_id,
                    text="",
                    token_ids=[],
                    num_prompt_tokens=len(prompt_token_ids),
                    num_cached_tokens=script.num_cached_tokens,
                    num_output_tokens=0,
                    prompt_logprobs=prompt_logprobs,
                    finish_reason="length",
                )
            for position, token in enumerate(tokens, start=1):
                if token.delay_s:
                    await asyncio.sleep(token.delay_s)
                finished = position == len(tokens) and script.failure is None
                own = script.error if isinstance(script.error, InvalidRequest) else InvalidRequest("")
                finish = script.finish_reason if len(tokens) == len(script.tokens) else "length"
                yield RequestOutput(
                    request_id=request_id,
                    text=token.text,
                    token_ids=[position],
                    num_prompt_tokens=len(prompt_token_ids),
                    num_cached_tokens=script.num_cached_tokens,
                    num_output_tokens=position,
                    logprobs=_logprobs(token, params),
                    prompt_logprobs=prompt_logprobs if position == 1 else None,
                    finish_reason=finish if finished else None,
                    stop_reason=script.stop_reason if finished else None,
                    error=str(script.error) if finished and script.error is not None else None,
                    error_param=own.param if finished else None,
                    error_code=own.code if finished else None,
                )
            if script.failure is not None:
                raise script.failure
        finally:
            self.num_open -= 1
            self.num_aborted += not finished

    async def record_trace(self, *, seconds: float, max_tokens: int, domain: str) -> TraceRecorded:
        if self.trace_ends is not None:
            raise RecordingInProgress("the routing is being recorded already")
        self.recordings.append((seconds, max_tokens, domain))
        self.trace_ends = asyncio.Event()
        try:
            with contextlib.suppress(asyncio.TimeoutError):
                await asyncio.wait_for(self.trace_ends.wait(), seconds)
        finally:
            self.trace_ends = None
        return self.recorded

    def end_trace(self) -> bool:
        if self.trace_ends is None:
            return False
        self.trace_ends.set()
        return True

    async def integrity_error(self) -> str | None:
        return self.integrity

    async def expert_table(self) -> ExpertTable | None:
        return self.table

    async def control_cache(self, action: str, experts: Sequence[tuple[int, int]] | None = None) -> int:
        if experts and experts[0][0] > 1:
            raise InvalidRequest("there is no such expert", param="experts")
        self.controlled.append((action, experts))
        return 3

    def abort(self, request_id: str) -> int:
        self.aborted.append(request_id)
        return int(any(seen == request_id for seen, _, _ in self.seen))

    def stats(self) -> EngineStats:
        values = {name: getattr(self.stats_to_tell, name) for name in self.stats_to_tell.__struct_fields__}
        return EngineStats(**{**values, "state": self.state})


def _logprobs(token: Token, params: SamplingParams) -> list[PositionLogprobs] | None:
    if params.logprobs is None:
        return None
    chosen = TokenLogprob(1, -0.5, token.bytes)
    others = [TokenLogprob(2 + rank, -1.0 - rank, b"x%d" % rank) for rank in range(params.logprobs - 1)]
    return [PositionLogprobs(chosen, [chosen, *others][: params.logprobs])]


def _prompt_logprobs(prompt_token_ids: list[int], params: SamplingParams) -> list[PositionLogprobs] | None:
    """Token t has the log-probability -t / 100."""
    if params.prompt_logprobs is None:
        return None
    likeliest = [TokenLogprob(120, -0.1, b"x")][: params.prompt_logprobs]
    first, *others = prompt_token_ids
    return [
        PositionLogprobs(TokenLogprob(first, math.nan, bytes([first])), []),
        *(PositionLogprobs(TokenLogprob(t, -t / 100, bytes([t])), likeliest) for t in others),
    ]
