"""/health and /ready: may requests be sent here? /live: should the process be left alone? /version."""

from __future__ import annotations

import msgspec
from fastapi import APIRouter, Response
from starlette.responses import JSONResponse

from server.context import VERSION, AppContext
from server.openapi import json_answer
from server.routes.answer import json_response


class Version(msgspec.Struct, frozen=True):
    version: str


def health_router(ctx: AppContext) -> APIRouter:
    router = APIRouter()

    def answer(ok: bool) -> JSONResponse:
        state = ctx.state
        return JSONResponse({"status": "ok" if ok else state}, status_code=200 if ok else 503)

    @router.get("/health", response_model=None)
    @router.get("/ready", response_model=None)
    async def ready() -> JSONResponse:
        return answer(ctx.state == "ready")

    @router.get("/live", response_model=None)
    async def live() -> JSONResponse:
        return answer(ctx.state not in ("dead", "stalled"))

    @router.get("/version", openapi_extra=json_answer(Version), response_model=None)
    async def version() -> Response:
        return json_response(Version(VERSION))

    return router
