"""/health and /ready: may requests be sent here? /live: should the process be left alone? /version."""

from __future__ import annotations

from fastapi import APIRouter
from starlette.responses import JSONResponse

from server.context import VERSION, AppContext


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
        return answer(ctx.state != "dead")

    @router.get("/version")
    async def version() -> dict[str, str]:
        return {"version": VERSION}

    return router
