"""POST /admin/trace: record which experts tokens are routed to, for a while. DELETE /admin/trace ends it early.

GET /admin/integrity: do the engine's books add up? POST /admin/drain: no new requests; DELETE /admin/drain: again.
"""

from __future__ import annotations

from typing import Annotated

import msgspec
from fastapi import APIRouter, Request, Response
from pydantic import Field

from engine.messages import MAX_TRACE_TOKENS
from server.auth import check_admin
from server.body import read_body
from server.context import AppContext
from server.errors import ApiError
from server.generation import unless_gone
from server.openapi import json_answer, json_body, other_answer
from server.protocol.fields import Body, Integer
from server.routes.answer import json_response

_MAX_SECONDS = 3600.0


class TraceBody(Body):
    """For how long, for how many tokens at most, and what the workload is called in the trace."""

    seconds: Annotated[float, Field(gt=0, le=_MAX_SECONDS)] = 60.0
    max_tokens: Annotated[Integer, Field(ge=1, le=MAX_TRACE_TOKENS)] = MAX_TRACE_TOKENS
    domain: Annotated[str, Field(max_length=100)] = ""


class Ended(msgspec.Struct, frozen=True):
    ended: bool = True


class Integrity(msgspec.Struct, frozen=True):
    ok: bool
    error: str | None
    num_requests: int


class Drain(msgspec.Struct, frozen=True):
    draining: bool
    num_requests: int  # that are still to be answered


_TRACE = json_body(TraceBody) | other_answer("application/octet-stream")


def admin_router(ctx: AppContext) -> APIRouter:
    router = APIRouter(prefix="/admin")

    @router.post("/trace", openapi_extra=_TRACE, response_model=None)
    async def record_trace(request: Request) -> Response:
        """The .npz when the recording has ended: after `seconds`, with `max_tokens`, by DELETE, or with the server.

        A client that leaves before ends it too, and then nothing is kept.
        """
        check_admin(request, ctx.settings)
        ctx.require_engine()
        body = await read_body(request, TraceBody, ctx)
        recording = ctx.engine.record_trace(seconds=body.seconds, max_tokens=body.max_tokens, domain=body.domain)
        recorded = await unless_gone(request.receive, recording)
        headers = {
            "Content-Disposition": 'attachment; filename="trace.npz"',
            "Cache-Control": "no-store",
            "X-Foregate-Tokens": str(recorded.num_tokens),
            "X-Foregate-Requests": str(recorded.num_requests),
            "X-Foregate-Full": str(recorded.is_full).lower(),  # it ended at max_tokens
        }
        return Response(recorded.npz, media_type="application/octet-stream", headers=headers)

    @router.delete("/trace", openapi_extra=json_answer(Ended), response_model=None)
    async def end_trace(request: Request) -> Response:
        """What is being recorded ends, and is the answer of the POST that asked for it."""
        check_admin(request, ctx.settings)
        if not ctx.engine.end_trace():
            raise ApiError(404, "nothing is being recorded", code="not_recording")
        return json_response(Ended())

    @router.get("/integrity", openapi_extra=json_answer(Integrity), response_model=None)
    async def integrity(request: Request) -> Response:
        """`error` says what is wrong with blocks, expert slots or the queue, and is null if nothing is.

        Without requests an expert that is still being read ahead counts as wrong: ask again a moment later.
        """
        check_admin(request, ctx.settings)
        ctx.require_engine()
        error = await ctx.engine.integrity_error()
        stats = ctx.engine.stats()
        return json_response(Integrity(error is None, error, stats.num_running + stats.num_waiting))

    @router.post("/drain", openapi_extra=json_answer(Drain), response_model=None)
    async def drain(request: Request) -> Response:
        """Not ready from now on; new requests are refused with 503, those that are here are served to their end.

        The server does not end by this: that is SIGTERM's. Ask again to see how many requests are left.
        """
        check_admin(request, ctx.settings)
        ctx.lifecycle.draining = ctx.lifecycle.refusing = True
        return json_response(_drain_state())

    @router.delete("/drain", openapi_extra=json_answer(Drain), response_model=None)
    async def undrain(request: Request) -> Response:
        """Back in service."""
        check_admin(request, ctx.settings)
        if ctx.lifecycle.stopping:
            raise ApiError(409, "the server is shutting down", code="shutting_down")
        ctx.lifecycle.draining = ctx.lifecycle.refusing = False
        return json_response(_drain_state())

    def _drain_state() -> Drain:
        stats = ctx.engine.stats()
        return Drain(ctx.lifecycle.draining, stats.num_running + stats.num_waiting)

    return router
