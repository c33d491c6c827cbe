"""An engine at work: takes messages between its steps, sends what comes of them. Knows no threads and no sockets."""

from __future__ import annotations

import logging
import queue
import time
from collections.abc import Callable
from functools import partial

from engine.cache_control import control_cache
from engine.engine import Engine
from engine.errors import InvalidRequest
from engine.messages import (
    AbortRequest,
    AddRequest,
    AskExperts,
    CheckIntegrity,
    ControlCache,
    ExpertsTold,
    Failed,
    FromEngine,
    IntegrityChecked,
    Outputs,
    StartTrace,
    StatsTaken,
    Stop,
    StopTrace,
    ToEngine,
    failed_output,
)
from engine.recordings import TraceService

_log = logging.getLogger(__name__)

_STATS_INTERVAL_S = 0.05

Inbox = queue.SimpleQueue[ToEngine]


class EngineService:
    """`run` serves on the thread that calls it until `Stop` is in the inbox, or the engine fails."""

    def __init__(self, engine: Engine, inbox: Inbox, send: Callable[[FromEngine], object]) -> None:
        """`send` is called on that thread and on one that packs recordings."""
        self._engine = engine
        self._inbox = inbox
        self._send = send
        self._traces = TraceService(engine.recordings, send)

    def run(self) -> bool:
        """Whether it was stopped, and did not fail. The engine is closed then."""
        try:
            self._serve()
        except Exception as error:
            _log.exception("the engine failed")
            self._send(Failed(f"{type(error).__name__}: {error}"))
            return False
        else:
            return True
        finally:
            self._tell_stats()
            self._traces.close()
            self._engine.close()

    def _serve(self) -> None:
        engine = self._engine
        told_at = 0.0
        while True:
            if not engine.has_work:
                self._tell_stats()
            for message in self._received(wait=not engine.has_work):
                if isinstance(message, Stop):
                    self._traces.stop()
                    return
                self._handle(message)
            outputs = engine.step()
            if outputs:
                self._send(Outputs(outputs))
            now = time.monotonic()
            if now - told_at > _STATS_INTERVAL_S:
                self._tell_stats()
                told_at = now

    def _handle(self, message: ToEngine) -> None:
        engine = self._engine
        match message:
            case AddRequest():
                self._add(message)
            case AbortRequest(request_id):
                engine.abort_request(request_id)
            case StartTrace(trace_id):
                end = partial(self._inbox.put, StopTrace(trace_id))
                engine.recordings.start(message, engine.scheduler.requests, when_full=end)
            case StopTrace():
                self._traces.stop(message)
            case AskExperts(ask_id):
                self._send(ExpertsTold(ask_id, engine.expert_table()))
            case ControlCache():
                self._send(control_cache(engine, message))
            case CheckIntegrity(ask_id):
                self._send(IntegrityChecked(ask_id, _integrity_error(engine)))
            case Stop():
                raise AssertionError("the loop's to handle")

    def _add(self, message: AddRequest) -> None:
        """What the engine cannot take fails alone."""
        try:
            self._engine.add_request(message.request_id, message.prompt_token_ids, message.params)
        except Exception as error:
            told: str | InvalidRequest
            if isinstance(error, InvalidRequest):
                told = error
            else:
                told = f"{type(error).__name__}: {error}"
                _log.exception("request %s could not be taken", message.request_id)
            self._send(Outputs([failed_output(message.request_id, told)]))

    def _tell_stats(self) -> None:
        self._send(StatsTaken(self._engine.stats()))

    def _received(self, *, wait: bool) -> list[ToEngine]:
        messages: list[ToEngine] = []
        try:
            while True:
                messages.append(self._inbox.get(block=wait and not messages))
        except queue.Empty:
            return messages


def _integrity_error(engine: Engine) -> str | None:
    try:
        engine.check_integrity()
    except AssertionError as problem:
        return str(problem)
    return None
