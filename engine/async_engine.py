"""The engine's face: asynchronous, and all that the server sees. The engine itself runs on a thread of its own.

Only `engine.messages` cross to that thread and back, so that it can become a process without a change above.
"""

from __future__ import annotations

import asyncio
import logging
import queue
import threading
import time
from collections.abc import AsyncGenerator, Callable
from functools import partial
from typing import TYPE_CHECKING, Any

import msgspec

from cache.expert_table import ExpertTable
from engine.admission import check_request
from engine.config import EngineConfig
from engine.errors import EngineDead, EngineOverloaded, InvalidRequest
from engine.expert_questions import ExpertQuestions
from engine.live_checks import LiveChecks, check_engine
from engine.live_trace import LiveTrace
from engine.messages import (
    MAX_TRACE_TOKENS,
    AbortRequest,
    AddRequest,
    AskExperts,
    CheckIntegrity,
    EngineState,
    EngineStats,
    ExpertsTold,
    ModelInfo,
    RequestOutput,
    StartTrace,
    StopTrace,
    TraceRecorded,
)
from engine.sampling_params import SamplingParams
from engine.threads import wait_passively
from engine.tokenizer import Tokenizer

if TYPE_CHECKING:
    from engine.convert import Progress
    from engine.engine import Engine
    from engine.recordings import TraceService

_log = logging.getLogger(__name__)

_STATS_INTERVAL_S = 0.05
_LONG_TEXT = 4096  # characters; longer texts are tokenised off the event loop

_Message = AddRequest | AbortRequest | StartTrace | StopTrace | CheckIntegrity | AskExperts


class AsyncEngine:
    """`start`, then `generate` for any number of requests at once, then `stop`. All calls from one event loop."""

    def __init__(
        self,
        config: EngineConfig,
        *,
        progress: Progress | None = None,
        build: Callable[[EngineConfig, Progress | None], Engine] | None = None,
    ) -> None:
        """`progress(what, done, total)` is told while the model loads, on the engine's thread.

        `build` stands in there for `Engine`, to load something else than the checkpoint that `config` names.
        """
        self._config = config
        self._progress = progress
        self._build = build
        self._state: EngineState = "stopped"
        self._error: str | None = None
        self._inbox: queue.SimpleQueue[_Message | None] = queue.SimpleQueue()
        self._streams: dict[str, asyncio.Queue[RequestOutput]] = {}
        self._trace = LiveTrace(self._inbox.put)
        self._checks = LiveChecks(self._inbox.put)
        self._questions = ExpertQuestions(self._inbox.put)
        self._thread: threading.Thread | None = None
        self._engine: Engine | None = None
        self._stats = EngineStats(state="stopped")
        self._last_step_at: float | None = None  # None: nothing to do
        self._limit = config.scheduler.max_num_seqs + config.scheduler.waiting_limit

    @property
    def info(self) -> ModelInfo:
        """The loaded model; raises `EngineDead` before `start` has returned."""
        return self._loaded().info

    async def start(self) -> None:
        """Load the model; raises `ConfigError`, `CheckpointError` or `PackedFileError`, each naming the cure."""
        loop = asyncio.get_running_loop()
        loaded: asyncio.Future[None] = loop.create_future()
        self._state = "loading"
        self._thread = threading.Thread(target=self._run, args=(loop, loaded), name="engine", daemon=True)
        self._thread.start()
        try:
            await loaded
        except Exception as error:
            self._state, self._error = "dead", str(error)
            raise
        self._state = "ready"

    async def stop(self, *, drain_s: float = 0.0) -> None:
        """Take no more requests, give those in flight up to `drain_s` seconds, then end the engine's thread."""
        if self._thread is None:
            return
        if self._state == "ready":
            self._state = "draining"
        deadline = time.monotonic() + drain_s
        while self._streams and self._state == "draining" and time.monotonic() < deadline:
            await asyncio.sleep(0.02)
        self._inbox.put(None)
        await asyncio.to_thread(self._thread.join)
        self._fail_all("the server is shutting down")
        self._thread = self._engine = None
        if self._state != "dead":
            self._state = "stopped"

    async def render_chat(self, messages: list[dict[str, Any]], *, add_generation_prompt: bool = True) -> list[int]:
        """Messages through the model's chat template; raises `InvalidRequest` if it has none or refuses them."""
        tokenizer = self._tokenizer()
        return await asyncio.to_thread(tokenizer.render_chat, messages, add_generation_prompt=add_generation_prompt)

    async def encode(self, text: str) -> list[int]:
        """Text to token ids, with the special tokens that the model wants around a prompt."""
        tokenizer = self._tokenizer()
        if len(text) < _LONG_TEXT:
            return tokenizer.encode(text)
        return await asyncio.to_thread(tokenizer.encode, text)

    async def decode(self, token_ids: list[int]) -> str:
        """Token ids to text, special tokens included; raises `InvalidRequest` for an id that there is not."""
        engine = self._loaded()
        if any(not 0 <= token_id < engine.info.vocab_size for token_id in token_ids):
            raise InvalidRequest(f"token ids must be between 0 and {engine.info.vocab_size - 1}", param="tokens")
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
        if request_id in self._streams:
            raise InvalidRequest(f"request id {request_id!r} is in use", param="request_id")
        if len(self._streams) >= self._limit:
            raise EngineOverloaded(f"the queue is full ({self._config.scheduler.waiting_limit} requests wait)")
        stream: asyncio.Queue[RequestOutput] = asyncio.Queue()
        self._streams[request_id] = stream
        self._inbox.put(AddRequest(request_id, prompt_token_ids, params))
        finished = False
        try:
            while not finished:
                output = await stream.get()
                finished = output.finish_reason is not None
                yield output
        finally:
            del self._streams[request_id]
            if not finished:
                self._inbox.put(AbortRequest(request_id))

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

    def stats(self) -> EngineStats:
        """The latest snapshot; at most a step old while the engine is busy."""
        age = 0.0 if self._last_step_at is None else time.monotonic() - self._last_step_at
        return msgspec.structs.replace(self._stats, state=self._state, last_step_age_s=age, error=self._error)

    async def integrity_error(self) -> str | None:
        """What does not add up in the books of the engine, looked at between two of its steps.

        Without requests nothing may be held: no block, no lease. Raises `EngineDead`.
        """
        self._require_ready()
        return await self._checks.ask()

    def _loaded(self) -> Engine:
        if self._engine is None:
            raise EngineDead(f"the engine is {self._state}" + (f": {self._error}" if self._error else ""))
        return self._engine

    def _require_ready(self) -> None:
        if self._state != "ready":
            raise EngineDead(f"the engine is {self._state}" + (f": {self._error}" if self._error else ""))

    def _tokenizer(self) -> Tokenizer:
        tokenizer = self._loaded().tokenizer
        assert isinstance(tokenizer, Tokenizer)
        return tokenizer

    def _deliver(self, outputs: list[RequestOutput]) -> None:
        for output in outputs:
            stream = self._streams.get(output.request_id)  # gone: the client left meanwhile
            if stream is not None:
                stream.put_nowait(output)

    def _fail_all(self, error: str) -> None:
        for request_id, stream in self._streams.items():
            stream.put_nowait(_failed(request_id, error))
        self._trace.fail(error)
        self._checks.fail(error)
        self._questions.fail(error)

    def _run(self, loop: asyncio.AbstractEventLoop, loaded: asyncio.Future[None]) -> None:
        """The engine's thread."""
        wait_passively()
        from engine.engine import Engine
        from engine.recordings import TraceService

        try:
            engine = (self._build or Engine)(self._config, self._progress)
        except BaseException as error:
            loop.call_soon_threadsafe(loaded.set_exception, error)
            return
        self._engine = engine
        self._stats = engine.stats()
        loop.call_soon_threadsafe(loaded.set_result, None)
        traces = TraceService(
            engine.recordings, lambda recorded: loop.call_soon_threadsafe(self._trace.deliver, recorded)
        )
        try:
            self._serve(engine, loop, traces)
        except Exception as error:
            _log.exception("the engine failed")
            self._state, self._error = "dead", f"{type(error).__name__}: {error}"
            loop.call_soon_threadsafe(self._fail_all, "the engine failed; the server's log says why")
        finally:
            self._last_step_at = None
            self._stats = engine.stats()
            traces.close()
            engine.close()

    def _serve(self, engine: Engine, loop: asyncio.AbstractEventLoop, traces: TraceService) -> None:
        stats_at = 0.0
        while True:
            if not engine.has_work:
                self._last_step_at = None
                self._stats = engine.stats()
            for message in self._drain(block=not engine.has_work):
                if message is None:
                    traces.stop()
                    return
                if isinstance(message, AddRequest):
                    engine.add_request(message.request_id, message.prompt_token_ids, message.params)
                elif isinstance(message, AbortRequest):
                    engine.abort_request(message.request_id)
                elif isinstance(message, AskExperts):
                    told = ExpertsTold(message.ask_id, engine.expert_table())
                    loop.call_soon_threadsafe(self._questions.deliver, told)
                elif isinstance(message, StartTrace):
                    end = partial(self._inbox.put, StopTrace(message.trace_id))
                    engine.recordings.start(message, engine.scheduler.requests, when_full=end)
                elif isinstance(message, CheckIntegrity):
                    loop.call_soon_threadsafe(self._checks.deliver, check_engine(engine, message))
                else:
                    traces.stop(message)
            if self._last_step_at is None:
                self._last_step_at = time.monotonic()
            outputs = engine.step()
            now = self._last_step_at = time.monotonic()
            if outputs:
                loop.call_soon_threadsafe(self._deliver, outputs)
            if now - stats_at > _STATS_INTERVAL_S:
                self._stats, stats_at = engine.stats(), now

    def _drain(self, *, block: bool = False) -> list[_Message | None]:
        messages: list[_Message | None] = []
        try:
            while True:
                messages.append(self._inbox.get(block=block and not messages))
        except queue.Empty:
            return messages


def _failed(request_id: str, error: str) -> RequestOutput:
    return RequestOutput(
        request_id=request_id,
        text="",
        token_ids=[],
        num_prompt_tokens=0,
        num_cached_tokens=0,
        num_output_tokens=0,
        finish_reason="error",
        error=error,
    )
