"""What an operator asks of a server: GET /admin/server, POST /admin/abort, POST /admin/cache/{reset,warm,pin}."""

from __future__ import annotations

from typing import Annotated, Any

import msgspec
from fastapi import APIRouter, Request, Response
from pydantic import BaseModel, Field

from engine.messages import EngineStats, ModelInfo
from server.auth import check_admin
from server.body import read_body
from server.context import VERSION, AppContext
from server.errors import ApiError
from server.openapi import json_answer, json_body
from server.protocol.fields import Body
from server.routes.answer import json_response

_Number = Annotated[int, Field(ge=0, lt=2**31)]
ExpertId = Annotated[list[_Number], Field(min_length=2, max_length=2)]  # layer, expert


class AbortBody(Body):
    """`id` of an answer, as its chunks tell it."""

    request_id: Annotated[str, Field(min_length=16, max_length=200)]


class WarmBody(Body):
    """[layer, expert] of each; null: as many as there is room for."""

    experts: Annotated[list[ExpertId], Field(max_length=100_000)] | None = None


class PinBody(Body):
    """[layer, expert] of all that are to be kept from now on; an empty list: none."""

    experts: Annotated[list[ExpertId], Field(max_length=100_000)]


class Aborted(msgspec.Struct, frozen=True):
    num_aborted: int  # a request with n choices counts n times


class CacheChanged(msgspec.Struct, frozen=True):
    num_experts: int  # forgotten, or begun to be read


class ServerInfo(msgspec.Struct, frozen=True, kw_only=True):
    version: str
    state: str
    uptime_s: float
    served_names: list[str]
    model: ModelInfo
    settings: dict[str, Any]
    stats: EngineStats


OPERATE_BODIES: list[type[BaseModel]] = [AbortBody, WarmBody, PinBody]
OPERATE_ANSWERS: list[type[msgspec.Struct]] = [Aborted, CacheChanged, ServerInfo]


def operate_router(ctx: AppContext) -> APIRouter:
    router = APIRouter(prefix="/admin")
    started_s = ctx.clock()

    @router.get("/server", openapi_extra=json_answer(ServerInfo), response_model=None)
    async def server_info(request: Request) -> Response:
        """The version, the model, the limits in force and a snapshot of the engine's counters. No keys."""
        check_admin(request, ctx.settings)
        ctx.require_engine()
        info = ServerInfo(
            version=VERSION,
            state=ctx.state,
            uptime_s=ctx.clock() - started_s,
            served_names=list(ctx.settings.served_names),
            model=ctx.engine.info,
            settings=ctx.settings.model_dump(mode="json", exclude={"api_key_hashes", "served_names"}),
            stats=ctx.engine.stats(),
        )
        return json_response(info)

    @router.post("/abort", openapi_extra=json_body(AbortBody, Aborted), response_model=None)
    async def abort(request: Request) -> Response:
        """End a running or waiting request; its client is told that the server aborted it."""
        check_admin(request, ctx.settings)
        ctx.require_engine()
        body = await read_body(request, AbortBody, ctx)
        num_aborted = ctx.engine.abort(body.request_id)
        if not num_aborted:
            raise ApiError(404, "there is no such request", param="request_id", code="request_not_found")
        return json_response(Aborted(num_aborted))

    @router.post("/cache/reset", openapi_extra=json_answer(CacheChanged), response_model=None)
    async def reset(request: Request) -> Response:
        """Forget the prefixes of prompts, and all experts that are neither in use nor kept."""
        check_admin(request, ctx.settings)
        ctx.require_engine()
        return json_response(CacheChanged(await ctx.engine.control_cache("reset")))

    @router.post("/cache/warm", openapi_extra=json_body(WarmBody, CacheChanged), response_model=None)
    async def warm(request: Request) -> Response:
        """Begin to read experts into free memory, in the given order; nothing is evicted for them."""
        check_admin(request, ctx.settings)
        ctx.require_engine()
        body = await read_body(request, WarmBody, ctx)
        experts = None if body.experts is None else [(layer, expert) for layer, expert in body.experts]
        return json_response(CacheChanged(await ctx.engine.control_cache("warm", experts)))

    @router.post("/cache/pin", openapi_extra=json_body(PinBody, CacheChanged), response_model=None)
    async def pin(request: Request) -> Response:
        """Keep these experts in memory, at most half of what it holds, and those that were kept before no longer."""
        check_admin(request, ctx.settings)
        ctx.require_engine()
        body = await read_body(request, PinBody, ctx)
        experts = [(layer, expert) for layer, expert in body.experts]
        return json_response(CacheChanged(await ctx.engine.control_cache("pin", experts)))

    return router
