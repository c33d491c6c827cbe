"""GET /dashboard/data: what the page at /dashboard asks for every second. Made for it, and may change with it."""

from __future__ import annotations

import uuid
from typing import Annotated, Any

import msgspec
from fastapi import APIRouter, Query, Response

from engine.errors import EngineDead
from engine.messages import EngineStats, ModelInfo
from server.context import VERSION, AppContext
from server.history import COLUMNS


def dashboard_router(ctx: AppContext) -> APIRouter:
    router = APIRouter()
    server_id = uuid.uuid4().hex  # tells the page that a server was restarted
    started_s = ctx.clock()

    @router.get("/dashboard/data", response_model=None)
    async def dashboard_data(after: Annotated[int, Query(ge=0)] = 0) -> Response:
        """The engine's state, the latest requests, and the rows of counters since number `after`, one a second."""
        stats = ctx.engine.stats()
        rows = ctx.history.since(after)
        now_s = ctx.clock()
        body = {
            "server": {"id": server_id, "version": VERSION, "uptime_s": now_s - started_s},
            "now_s": now_s,
            "state": ctx.state,
            "error": stats.error,
            "last_step_age_s": stats.last_step_age_s,
            "model": _model(ctx),
            "experts": _experts(stats),
            "columns": ["seq", "time_s", *COLUMNS],
            "rows": [[row.seq, *row.values] for row in rows],
            "turned_away": ctx.requests.num_turned_away,
            "requests": ctx.requests.lines(),
        }
        return Response(msgspec.json.encode(body), media_type="application/json", headers={"Cache-Control": "no-store"})

    return router


def _model(ctx: AppContext) -> dict[str, Any] | None:
    """None while it loads."""
    try:
        info: ModelInfo = ctx.engine.info
    except EngineDead:
        return None
    return {
        "name": ctx.settings.served_names[0],
        "type": info.model_type,
        "max_model_len": info.max_model_len,
        "dtype": info.dtype,
        "expert_format": info.expert_format,
    }


def _experts(stats: EngineStats) -> dict[str, int] | None:
    """Sizes of the tiers; None for a model without experts."""
    cache = stats.expert_cache
    if not cache.num_slots:
        return None
    return {
        "slots": cache.num_slots,
        "slot_bytes": cache.slot_nbytes,
        "host_slots": cache.host_slots,
        "host_slots_used": cache.host_slots_used,
    }
