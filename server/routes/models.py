"""GET /v1/models and /v1/models/{id}: the served names, each the same model."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter

from server.context import AppContext
from server.errors import ApiError


def models_router(ctx: AppContext) -> APIRouter:
    router = APIRouter()
    started = int(ctx.now())

    def card(name: str) -> dict[str, Any]:
        return {
            "id": name,
            "object": "model",
            "created": started,
            "owned_by": "foregate",
            "root": ctx.settings.served_names[0],
            "parent": None,
            "max_model_len": ctx.engine.info.max_model_len,
        }

    @router.get("/v1/models")
    async def list_models() -> dict[str, Any]:
        ctx.require_engine()
        return {"object": "list", "data": [card(name) for name in ctx.settings.served_names]}

    @router.get("/v1/models/{model_id:path}")  # hub names have slashes
    async def get_model(model_id: str) -> dict[str, Any]:
        ctx.require_engine()
        if model_id not in ctx.settings.served_names:
            raise ApiError(404, f"the model `{model_id[:200]}` does not exist", param="model", code="model_not_found")
        return card(model_id)

    return router
