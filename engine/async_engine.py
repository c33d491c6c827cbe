"""The engine's face: asynchronous, and all that the server sees. The engine itself is a child process or a thread.

Only `engine.messages` cross to it and back, over an `engine.link`. A process that dies is started again.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncGenerator, Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import msgspec

from cache.expert_table import ExpertTable
from engine.admission import check_request, too_long
from engine.build import Build
from engine.cache_control import CacheControls
from engine.config import EngineConfig
from engine.errors import EngineDead, EngineOverloaded, InvalidRequest
from engine.expert_questions import ExpertQuestions
from engine.grammar_trial import GrammarTrial
from engine.link import EngineLink, ThreadLink
from engine.live_checks import LiveChecks
from engine.live_trace import LiveTrace
from engine.messages import (
    MAX_TRACE_TOKENS,
    AbortRequest,
    AddRequest,
    CacheAction,
    CacheControlled,
    EngineState,
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
from engine.restarts import Restarts
from engine.sampling_params import SamplingParams
from engine.streams import Stream
from engine.template_pool import TemplatePool
from engine.tokenizer import Tokenizer

if TYPE_CHECKING:
    from engine.convert import Progress
    from engine.engine import Engine

_log = logging.getLogger(__name__)

_LONG_TEXT = 4096  # characters; longer texts are tokenised off the event loop
_CHARS_A_TOKEN = 32  # texts longer than that many for each token of the context are looked at in part first
_CUT_TOKENS = 64  # that may become fewer when a text goes on where it was cut
_STOP_S = 1.0  # for the running step to end, when there was no time left for requests


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
        self._restarts = restarts or Restarts()
        self._stall_timeout_s = stall_timeout_s
        self._watching: asyncio.Task[None] | None = None
        self._restarting: asyncio.Task[None] | None = None
        self._num_restarts = 0
        self._state: EngineState = "stopped"
        self._error: str | None = None
        self._link: EngineLink | None = None
        self._info: ModelInfo | None = None
        self._streams: dict[str, Stream] = {}
        self._queued: dict[str, int] = {}  # prompt tokens of those that have not been answered at all yet
        self._trace = LiveTrace(self._send)
        self._checks = LiveChecks(self._send)
        self._questions = ExpertQuestions(self._send)
        self._controls = CacheControls(self._send)
        self._trial = GrammarTrial(lambda: self._tokenizer().to_json())
        self._templates = TemplatePool()
        self._stats = EngineStats(state="stopped")
        self._progress_at = 0.0  # the engine has told something, or been given its first request
        self._limit = config.scheduler.max_num_seqs + config.scheduler.waiting_limit

    @property
    def info(self) -> ModelInfo:
        """The loaded model; raises `EngineDead` before `start` has returned."""
        if self._info is None:
            raise self._dead()
        return self._info

    async def start(self) -> None:
        """Load the model; raises `ConfigError`, `CheckpointError` or `PackedFileError`, each naming the cure."""
        self._state = "loading"
        link = self._make_link()
        try:
            await link.start()
        except Exception as error:
            self._state, self._error = "dead", str(error)
            raise
        self._link, self._info, self._state = link, link.info, "ready"
        if self._stall_timeout_s is not None:
            self._watching = asyncio.ensure_future(self._watch(2 * self._stall_timeout_s))

    async def stop(self, *, drain_s: float = 0.0) -> None:
        """Take no more requests, give those in flight up to `drain_s` seconds, then end the engine."""
        deadline = time.monotonic() + drain_s
        for task in (self._watching, self._restarting):
            if task is not None:
                task.cancel()
                await asyncio.wait({task})
        if self._state in ("ready", "restarting"):
            self._state = "draining"
        while self._streams and self._state == "draining" and time.monotonic() < deadline:
            await asyncio.sleep(0.02)
        await self._trial.close()
        await self._templates.close()
        if self._link is None:
            return
        for request_id in self._streams:
            self._send(AbortRequest(request_id))
        self._fail_streams("the server is shutting down")
        await self._link.stop(max(0.0, deadline - time.monotonic()) + _STOP_S)
        self._fail_all("the server is shutting down")
        self._link = self._info = None
        if self._state != "dead":
            self._state = "stopped"

    def check_room(self) -> None:
        """Raises `EngineOverloaded` if a request would be refused now, so that nobody prepares one for nothing."""
        self._require_room(1)

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
        tokenizer = self._tokenizer()
        template = tokenizer.chat_template(has_tools=tools is not None)
        given = {**(variables or {}), **tokenizer.special_tokens, "add_generation_prompt": add_generation_prompt}
        text = await self._templates.render(
            template,
            messages,
            {**given, "tools": tools},
            continue_final_message=continue_final_message,
        )
        return await self._encode(text, add_special_tokens=False, param="messages")

    async def encode(self, text: str) -> list[int]:
        """Text to token ids, with the special tokens that the model wants around a prompt.

        Raises `InvalidRequest` for a text that is far too long for the model, before all of it is looked at.
        """
        return await self._encode(text, add_special_tokens=True, param="prompt")

    async def decode(self, token_ids: list[int]) -> str:
        """Token ids to text, special tokens included; raises `InvalidRequest` for an id that there is not."""
        vocab_size = self.info.vocab_size
        if any(not 0 <= token_id < vocab_size for token_id in token_ids):
            raise InvalidRequest(f"token ids must be between 0 and {vocab_size - 1}", param="tokens")
        return await asyncio.to_thread(self._tokenizer().decode, token_ids, skip_special_tokens=False)

    async def generate(
        self, request_id: str, prompt_token_ids: list[int], params: SamplingParams
    ) -> AsyncGenerator[RequestOutput, None]:
        """Serve one request; yields what is new until an output has a `finish_reason`.

        Closing the generator aborts the request. Raises at the first step, before anything is queued:
        `InvalidRequest`, `EngineOverloaded` (the queue is full) or `EngineDead`.
        """
        self._require_ready()
        check_request(self.info, prompt_token_ids, params)
        self._require_room(len(prompt_token_ids))
        if params.structure is not None:
            params = msgspec.structs.replace(params, structure=await self._trial.passed(params.structure))
            self._require_ready()
            self._require_room(len(prompt_token_ids))
        if request_id in self._streams:
            raise InvalidRequest(f"request id {request_id!r} is in use", param="request_id")
        try:
            self._send(AddRequest(request_id, prompt_token_ids, params))
        except (ValueError, OverflowError, TypeError) as error:
            raise InvalidRequest(f"a parameter cannot be passed on: {error}") from error
        if not self._streams:
            self._progress_at = time.monotonic()
        stream = self._streams[request_id] = Stream()
        self._queued[request_id] = len(prompt_token_ids)
        finished = False
        try:
            while not finished:
                output = await stream.get()
                self._queued.pop(request_id, None)
                finished = output.finish_reason is not None
                yield output
        finally:
            del self._streams[request_id]
            self._queued.pop(request_id, None)
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
        self._require_ready()
        if self.info.expert_format is None:
            raise InvalidRequest("this model has no experts whose routing could be recorded", param="model")
        recorded = await self._trace.record(seconds=seconds, max_tokens=max_tokens, domain=domain)
        if recorded.error is not None:
            self._require_ready()
            raise RuntimeError(recorded.error)
        return recorded

    def end_trace(self) -> bool:
        """End what `record_trace` records, which then returns it; False: nothing is being recorded."""
        return self._trace.end()

    async def expert_table(self) -> ExpertTable | None:
        """What is known of each expert between two steps; None for a model without. Raises `EngineDead`."""
        if self._state != "draining":
            self._require_ready()
        return await self._questions.ask()

    async def control_cache(self, action: CacheAction, experts: Sequence[tuple[int, int]] | None = None) -> int:
        """ "reset": forget prefixes, and experts that are not in use or kept. "warm": read experts into free slots.
        "pin": read these and keep them, and only them, from now on. -> of how many experts.

        Raises `InvalidRequest` for experts that are not there or do not fit, and `EngineDead`.
        """
        self._require_ready()
        return await self._controls.ask(action, experts)

    def abort(self, request_id: str) -> int:
        """End a request, or all the choices of one, whose readers get an output that says so; -> how many ended."""
        found = [one for one in self._streams if request_id in (one, one.rpartition("-")[0])]
        for one in found:
            self._send(AbortRequest(one))
            self._streams[one].put(msgspec.structs.replace(failed_output(one, ""), finish_reason="abort", error=None))
        return len(found)

    def stats(self) -> EngineStats:
        """The latest snapshot, a twentieth of a second old or a step; `last_step_age_s` is up to now."""
        return msgspec.structs.replace(
            self._stats,
            state=self._state,
            last_step_age_s=time.monotonic() - self._progress_at if self._streams else 0.0,
            restarts_total=self._num_restarts,
            error=self._error,
        )

    async def integrity_error(self) -> str | None:
        """What does not add up in the books of the engine, looked at between two of its steps.

        Without requests nothing may be held: no block, no lease. Raises `EngineDead`.
        """
        self._require_ready()
        return await self._checks.ask()

    def _make_link(self) -> EngineLink:
        if not self._in_child:
            return ThreadLink(self._config, self._build, self._progress, self._receive, self._ended)
        build = Build() if self._build is None else self._build
        if not isinstance(build, Build):
            raise TypeError("what a child process is to build goes by name: a Build")
        return ProcessLink(self._config, build, self._progress, self._receive, self._ended)

    def _dead(self) -> EngineDead:
        return EngineDead(f"the engine is {self._state}" + (f": {self._error}" if self._error else ""))

    def _require_ready(self) -> None:
        if self._state != "ready":
            raise self._dead()

    def _require_room(self, num_tokens: int) -> None:
        if len(self._streams) >= self._limit:
            raise EngineOverloaded(f"the queue is full ({self._config.scheduler.waiting_limit} requests wait)")
        num_queued = sum(self._queued.values())
        if num_queued and num_queued + num_tokens > self._config.scheduler.max_queued_tokens:
            raise EngineOverloaded(f"the queue is full (prompts of {num_queued} tokens wait)")

    async def _encode(self, text: str, *, add_special_tokens: bool, param: str) -> list[int]:
        encode = partial(self._tokenizer().encode, add_special_tokens=add_special_tokens)
        if len(text) < _LONG_TEXT:
            return encode(text)
        limit = self.info.max_model_len
        begin = text[: _CHARS_A_TOKEN * limit]
        if len(begin) < len(text):
            num_tokens = len(await asyncio.to_thread(encode, begin))
            if num_tokens > limit + _CUT_TOKENS:
                raise too_long(limit, f"at least {num_tokens - _CUT_TOKENS}", param=param)
        return await asyncio.to_thread(encode, text)

    def _tokenizer(self) -> Tokenizer:
        if self._link is None:
            raise self._dead()
        return self._link.tokenizer

    def _send(self, message: ToEngine) -> None:
        if self._link is not None:
            self._link.send(message)

    def _receive(self, message: FromEngine) -> None:
        self._progress_at = time.monotonic()
        match message:
            case Outputs(outputs):
                for output in outputs:
                    stream = self._streams.get(output.request_id)  # gone: the client left meanwhile
                    if stream is not None:
                        stream.put(output)
            case StatsTaken(stats):
                self._stats = stats
            case TraceRecorded():
                self._trace.deliver(message)
            case IntegrityChecked():
                self._checks.deliver(message)
            case CacheControlled():
                self._controls.deliver(message)
            case ExpertsTold():
                self._questions.deliver(message)
            case Failed():
                raise AssertionError("the link's to handle")

    def _fail_streams(self, error: str) -> None:
        for request_id, stream in self._streams.items():
            stream.put(failed_output(request_id, error))

    def _fail_all(self, error: str) -> None:
        self._fail_streams(error)
        self._trace.fail(error)
        self._checks.fail(error)
        self._questions.fail(error)
        self._controls.fail(error)

    def _ended(self, why: str) -> None:
        """The engine has failed or died by itself."""
        self._error = why
        self._stats = EngineStats(state="dead")
        is_supervised = self._state == "ready" and self._link is not None and self._link.may_restart
        self._state = "restarting" if is_supervised else "dead"
        self._fail_all("the engine failed; the server's log says why")
        if is_supervised:
            self._restarting = asyncio.ensure_future(self._restart())

    async def _watch(self, limit_s: float) -> None:
        """Whoever probes /live had that long to end this process: it may be nobody."""
        while True:
            await asyncio.sleep(limit_s / 20)
            if self._state == "ready" and self.stats().last_step_age_s > limit_s:
                _log.error("the engine has not made a step for %g s", limit_s)
                assert self._link is not None
                self._link.kill()
                self._progress_at = time.monotonic()

    async def _restart(self) -> None:
        """Until it serves again, or has died too often."""
        assert self._link is not None
        await self._link.stop(_STOP_S)
        while (delay_s := self._restarts.delay_after_death()) is not None:
            _log.warning("the engine is started again in %g s", delay_s)
            await asyncio.sleep(delay_s)
            began = time.monotonic()
            link = self._link.again()
            try:
                await link.start()
            except Exception as error:
                self._error = str(error)
                _log.error("the engine could not be started again: %s", error)
                continue
            self._link, self._info, self._error = link, link.info, None
            self._state = "ready"
            self._num_restarts += 1
            _log.warning("the engine serves again after %.1f s", time.monotonic() - began)
            return
        self._state = "dead"
        _log.error("the engine has died too often and is not started again")
