"""The HTTP application around an engine. Starts and stops nothing: `server.serve` does."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager
from typing import Any

import msgspec
from fastapi import FastAPI
from fastapi.exceptions import RequestValidationError
from pydantic import BaseModel
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response

from engine.errors import EngineDead, EngineOverloaded, InvalidRequest, RecordingInProgress
from server.auth import OPEN_PATHS, KeyCheck
from server.context import VERSION, AppContext, Lifecycle
from server.door import Door
from server.engine_face import Engine
from server.errors import ApiError, GenerationFailed, as_api_error
from server.history import History
from server.metrics import ServerMetrics
from server.middleware import RequestObserver, record_of
from server.openapi import describe
from server.protocol.chat import ChatChunk, ChatCompletion, ChatRequest
from server.protocol.completions import Completion, CompletionRequest
from server.request_log import RequestLog
from server.routes import ROUTERS
from server.routes.admin import Drain, Ended, Integrity, TraceBody
from server.routes.health import Version
from server.routes.models import ModelCard, ModelList
from server.routes.operate import OPERATE_ANSWERS, OPERATE_BODIES
from server.routes.pages import PAGE_PATHS
from server.routes.tokenize import DetokenizeRequest, Text, TokenizeRequest, Tokens
from server.settings import AppSettings

BODIES: list[type[BaseModel]] = [
    *(ChatRequest, CompletionRequest, TokenizeRequest, DetokenizeRequest, TraceBody),
    *OPERATE_BODIES,
]
ANSWERS: list[type[msgspec.Struct]] = [
    *OPERATE_ANSWERS,
    ChatCompletion,
    ChatChunk,
    Completion,
    ModelCard,
    ModelList,
    Tokens,
    Text,
    Version,
    Drain,
    Ended,
    Integrity,
]
_DESCRIPTION = "OpenAI's API for a Mixture-of-Experts model that does not fit in fast memory, and what operates it."


def create_app(
    engine: Engine,
    settings: AppSettings,
    *,
    lifecycle: Lifecycle | None = None,
    clock: Callable[[], float] = time.monotonic,
) -> FastAPI:
    """An application that shares nothing with any other. `engine` may still be loading."""
    lifecycle = lifecycle or Lifecycle()
    metrics = ServerMetrics(
        settings.served_names[0],
        engine.stats,
        vllm_names=settings.metrics_compat == "vllm",
        startup_s=lambda: lifecycle.startup_s,
    )
    requests, history = RequestLog(clock), History(engine.stats, clock)
    ctx = AppContext(engine, settings, metrics, lifecycle, requests, history, clock=clock)
    app = FastAPI(
        title="Foregate",
        version=VERSION,
        description=_DESCRIPTION,
        docs_url=None,  # server.routes.pages has ours
        redoc_url=None,
        redirect_slashes=False,
        lifespan=lambda _: _alongside(metrics.watch_event_loop, history.run),
    )
    for make_router in ROUTERS.values():
        app.include_router(make_router(ctx))
    _answer_errors(app, metrics)
    describe(app, BODIES, ANSWERS, needs_key=bool(settings.api_key_hashes))
    app.add_middleware(Door, check_room=engine.check_room, metrics=metrics)
    if settings.api_key_hashes:
        open_paths = OPEN_PATHS | PAGE_PATHS | ({"/metrics"} if settings.open_metrics else set())
        app.add_middleware(KeyCheck, key_hashes=settings.api_key_hashes, open_paths=open_paths)
    app.add_middleware(RequestObserver, metrics=metrics, requests=requests, clock=clock)
    return app


@asynccontextmanager
async def _alongside(*runs: Callable[[], Coroutine[Any, Any, None]]) -> AsyncIterator[None]:
    """What goes on while the application is served: its event loop is watched, its history written."""
    tasks = [asyncio.ensure_future(run()) for run in runs]
    try:
        yield
    finally:
        for task in tasks:
            task.cancel()


def _answer_errors(app: FastAPI, metrics: ServerMetrics) -> None:
    async def answer(request: Request, exc: Exception) -> Response:
        if isinstance(exc, EngineOverloaded):
            metrics.reject("queue_full")
        if isinstance(exc, EngineDead):
            metrics.reject("dead")
        if isinstance(exc, GenerationFailed):
            record_of(request).finish_reason = "error"
        return as_api_error(exc).response()

    engines = (InvalidRequest, EngineOverloaded, EngineDead, RecordingInProgress)
    for kind in (ApiError, GenerationFailed, HTTPException, RequestValidationError, *engines):
        app.add_exception_handler(kind, answer)
