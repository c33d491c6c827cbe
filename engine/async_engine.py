"""The engine's face: asynchronous, and all that the server sees. The engine itself is a child process or a thread.

Only `engine.messages` cross to it and back, over an `engine.link`. A process that dies is started again.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncGenerator, Callable, Sequence
from typing import TYPE_CHECKING, Any

import msgspec

from cache.expert_table import ExpertTable
from engine.admission import check_request
from engine.build import Build
from engine.config import EngineConfig
from engine.errors import InvalidRequest
from engine.expert_questions import ExpertQuestions
from engine.grammar_trial import GrammarTrial
from engine.link import EngineLink, ThreadLink
from engine.live_trace import LiveTrace
from engine.messages import (
    MAX_TRACE_TOKENS,
    AbortRequest,
    AddRequest,
    CacheAction,
    CacheControlled,
    CheckIntegrity,
    ControlCache,
    EngineStats,
    ExpertsTold,
    Failed,
    FromEngine,
    IntegrityChecked,
    ModelInfo,
    Outputs,
    RequestOutput,
    StatsTaken,
    ToEngine,
    TraceRecorded,
    failed_output,
)
from engine.process_link import ProcessLink
from engine.prompts import Prompts
from engine.questions import Questions
from engine.restarts import Restarts
from engine.sampling_params import SamplingParams
from engine.streams import Streams
from engine.supervisor import STOP_S, Supervisor, cancelled

if TYPE_CHECKING:
    from engine.convert import Progress
    from engine.engine import Engine

_log = logging.getLogger(__name__)


class AsyncEngine:
    """`start`, then `generate` for any number of requests at once, then `stop`. All calls from one event loop."""

    def __init__(
        self,
        config: EngineConfig,
        *,
        progress: Progress | None = None,
        build: Callable[[EngineConfig, Progress | None], Engine] | Build | None = None,
        in_child: bool = False,
        restarts: Restarts | None = None,
        stall_timeout_s: float | None = None,
    ) -> None:
        """`progress(what, done, total)` is told while the model loads, on the engine's thread if it has one here.

        `build` stands in for `Engine`, to load something else than the checkpoint that `config` names. `in_child`: in
        a process of its own, which is started again when it has died, as `restarts` says; `build` then goes by name.
        One that has not made a step for twice `stall_timeout_s` while there is work is killed, and has died then, too.
        """
        self._config = config
        self._progress = progress
        self._build = build
        self._in_child = in_child
        self._stall_timeout_s = stall_timeout_s
        self._watching: asyncio.Task[None] | None = None
        self._supervisor = Supervisor(self._make_link, restarts or Restarts(), self._died)
        self._streams = Streams(config.scheduler)
        self._prompts = Prompts(lambda: self._supervisor.tokenizer, lambda: self.info)
        self._trace = LiveTrace(self._send)
        self._checks: Questions[CheckIntegrity, IntegrityChecked] = Questions(self._send)
        self._controls: Questions[ControlCache, CacheControlled] = Questions(self._send)
        self._experts = ExpertQuestions(self._send)
        self._trial = GrammarTrial(lambda: self._supervisor.tokenizer.to_json())
        self._stats = EngineStats(state="stopped")
        self._progress_at = 0.0  # the engine has told something, or been given its first request

    @property
    def info(self) -> ModelInfo:
        """The loaded model; raises `EngineDead` before `start` has returned."""
        return self._supervisor.info

    async def start(self) -> None:
        """Load the model; raises `ConfigError`, `CheckpointError` or `PackedFileError`, each naming the cure."""
        await self._supervisor.start()
        if self._stall_timeout_s is not None:
            self._watching = asyncio.ensure_future(self._watch(2 * self._stall_timeout_s))

    async def stop(self, *, drain_s: float = 0.0) -> None:
        """Take no more requests, give those in flight up to `drain_s` seconds, then end the engine."""
        deadline = time.monotonic() + drain_s
        await cancelled(self._watching)
        await self._supervisor.drain()
        while self._streams and self._supervisor.state == "draining" and time.monotonic() < deadline:
            await asyncio.sleep(0.02)
        await self._trial.close()
        await self._prompts.close()
        if self._supervisor.link is None:
            return
        for request_id in self._streams:
            self._send(AbortRequest(request_id))
        self._streams.fail("the server is shutting down")
        await self._supervisor.stop(max(0.0, deadline - time.monotonic()) + STOP_S)
        self._fail_all("the server is shutting down")

    def check_room(self) -> None:
        """Raises `EngineOverloaded` if a request would be refused now, so that nobody prepares one for nothing."""
        self._streams.require_room(1)

    async def render_chat(
        self,
        messages: list[dict[str, Any]],
        *,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        tools: list[dict[str, Any]] | None = None,
        variables: dict[str, Any] | None = None,
    ) -> list[int]:
        """Messages through the model's chat template; raises `InvalidRequest` if it has none or refuses them."""
        return await self._prompts.of_chat(
            messages,
            continue_final_message=continue_final_message,
            tools=tools,
            variables={**(variables or {}), "add_generation_prompt": add_generation_prompt},
        )

    async def encode(self, text: str) -> list[int]:
        """Text to token ids, with the special tokens that the model wants around a prompt.

        Raises `InvalidRequest` for a text that is far too long for the model, before all of it is looked at.
        """
        return await self._prompts.encode(text)

    async def decode(self, token_ids: list[int]) -> str:
        """Token ids to text, special tokens included; raises `InvalidRequest` for an id that there is not."""
        return await self._prompts.decode(token_ids)

    async def generate(
        self, request_id: str, prompt_token_ids: list[int], params: SamplingParams
    ) -> AsyncGenerator[RequestOutput, None]:
        """Serve one request; yields what is new until an output has a `finish_reason`.

        Closing the generator aborts the request. Raises at the first step, before anything is queued:
        `InvalidRequest`, `EngineOverloaded` (the queue is full) or `EngineDead`.
        """
        self._supervisor.require_ready()
        check_request(self.info, prompt_token_ids, params)
        self._streams.require_room(len(prompt_token_ids))
        if params.structure is not None:
            params = msgspec.structs.replace(params, structure=await self._trial.passed(params.structure))
            self._supervisor.require_ready()
            self._streams.require_room(len(prompt_token_ids))
        if request_id in self._streams:
            raise InvalidRequest(f"request id {request_id!r} is in use", param="request_id")
        try:
            self._send(AddRequest(request_id, prompt_token_ids, params))
        except (ValueError, OverflowError, TypeError) as error:
            raise InvalidRequest(f"a parameter cannot be passed on: {error}") from error
        if not self._streams:
            self._progress_at = time.monotonic()
        finished = False
        with self._streams.opened(request_id, len(prompt_token_ids)) as stream:
            try:
                while not finished:
                    output = await stream.get()
                    finished = output.finish_reason is not None
                    yield output
            finally:
                if not finished:
                    self._send(AbortRequest(request_id))

    async def record_trace(
        self, *, seconds: float, max_tokens: int = MAX_TRACE_TOKENS, domain: str = ""
    ) -> TraceRecorded:
        """Record which experts tokens are routed to from now on, those of running requests too.

        Ends after `seconds`, with `max_tokens`, by `end_trace` or with the engine's `stop`; when it is cancelled,
        what was recorded is thrown away. Raises `RecordingInProgress`, `EngineDead`, and `InvalidRequest` for a
        model without experts.
        """
        self._supervisor.require_ready()
        if self.info.expert_format is None:
            raise InvalidRequest("this model has no experts whose routing could be recorded", param="model")
        recorded = await self._trace.record(seconds=seconds, max_tokens=max_tokens, domain=domain)
        if recorded.error is not None:
            self._supervisor.require_ready()
            raise RuntimeError(recorded.error)
        return recorded

    def end_trace(self) -> bool:
        """End what `record_trace` records, which then returns it; False: nothing is being recorded."""
        return self._trace.end()

    async def expert_table(self) -> ExpertTable | None:
        """What is known of each expert between two steps; None for a model without. Raises `EngineDead`."""
        if self._supervisor.state != "draining":
            self._supervisor.require_ready()
        return await self._experts.ask()

    async def control_cache(self, action: CacheAction, experts: Sequence[tuple[int, int]] | None = None) -> int:
        """ "reset": forget prefixes, and experts that are not in use or kept. "warm": read experts into free slots.
        "pin": read these and keep them, and only them, from now on. -> of how many experts.

        Raises `InvalidRequest` for experts that are not there or do not fit, and `EngineDead`.
        """
        self._supervisor.require_ready()
        listed = None if experts is None else list(experts)
        answer = await self._controls.ask(lambda ask_id: ControlCache(ask_id, action, listed))
        if answer.error is not None:
            raise InvalidRequest(answer.error, param="experts")
        return answer.num_experts

    def abort(self, request_id: str) -> int:
        """End a request, or all the choices of one, whose readers get an output that says so; -> how many ended."""
        found = [one for one in self._streams if request_id in (one, one.rpartition("-")[0])]
        for one in found:
            self._send(AbortRequest(one))
            self._streams.put(msgspec.structs.replace(failed_output(one, ""), finish_reason="abort", error=None))
        return len(found)

    def stats(self) -> EngineStats:
        """The latest snapshot, a twentieth of a second old or a step; `last_step_age_s` is up to now."""
        return msgspec.structs.replace(
            self._stats,
            state=self._supervisor.state,
            last_step_age_s=time.monotonic() - self._progress_at if self._streams else 0.0,
            restarts_total=self._supervisor.num_restarts,
            error=self._supervisor.error,
        )

    async def integrity_error(self) -> str | None:
        """What does not add up in the books of the engine, looked at between two of its steps.

        Without requests nothing may be held: no block, no lease. Raises `EngineDead`.
        """
        self._supervisor.require_ready()
        return (await self._checks.ask(CheckIntegrity)).error

    def _make_link(self) -> EngineLink:
        if not self._in_child:
            return ThreadLink(self._config, self._build, self._progress, self._receive, self._supervisor.ended)
        build = Build() if self._build is None else self._build
        if not isinstance(build, Build):
            raise TypeError("what a child process is to build goes by name: a Build")
        return ProcessLink(self._config, build, self._progress, self._receive, self._supervisor.ended)

    def _send(self, message: ToEngine) -> None:
        self._supervisor.send(message)

    def _receive(self, message: FromEngine) -> None:
        self._progress_at = time.monotonic()
        match message:
            case Outputs(outputs):
                for output in outputs:
                    self._streams.put(output)
            case StatsTaken(stats):
                self._stats = stats
            case TraceRecorded():
                self._trace.deliver(message)
            case IntegrityChecked():
                self._checks.deliver(message)
            case CacheControlled():
                self._controls.deliver(message)
            case ExpertsTold():
                self._experts.deliver(message)
            case Failed():
                raise AssertionError("the link's to handle")

    def _died(self) -> None:
        self._stats = EngineStats(state="dead")
        self._fail_all("the engine failed; the server's log says why")

    def _fail_all(self, error: str) -> None:
        self._streams.fail(error)
        self._trace.fail(error)
        self._checks.fail(error)
        self._experts.fail(error)
        self._controls.fail(error)

    async def _watch(self, limit_s: float) -> None:
        """Whoever probes /live had that long to end this process: it may be nobody."""
        while True:
            await asyncio.sleep(limit_s / 20)
            if self._supervisor.state == "ready" and self.stats().last_step_age_s > limit_s:
                _log.error("the engine has not made a step for %g s", limit_s)
                self._supervisor.kill()
                self._progress_at = time.monotonic()
