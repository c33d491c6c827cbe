"""GET /v1/models and /v1/models/{id}: the served names, each the same model."""

from __future__ import annotations

import msgspec
from fastapi import APIRouter, Response

from server.context import AppContext
from server.errors import ApiError
from server.openapi import json_answer
from server.routes.answer import json_response


class ModelCard(msgspec.Struct, frozen=True, kw_only=True):
    id: str
    object: str = "model"
    created: int
    owned_by: str = "foregate"
    root: str
    parent: None = None
    max_model_len: int  # tokens, prompt and output together


class ModelList(msgspec.Struct, frozen=True, kw_only=True):
    object: str = "list"
    data: list[ModelCard]


def models_router(ctx: AppContext) -> APIRouter:
    router = APIRouter()
    started = int(ctx.now())

    def card(name: str) -> ModelCard:
        return ModelCard(
            id=name, created=started, root=ctx.settings.served_names[0], max_model_len=ctx.engine.info.max_model_len
        )

    @router.get("/v1/models", openapi_extra=json_answer(ModelList), response_model=None)
    async def list_models() -> Response:
        ctx.require_engine()
        return json_response(ModelList(data=[card(name) for name in ctx.settings.served_names]))

    @router.get("/v1/models/{model_id:path}", openapi_extra=json_answer(ModelCard), response_model=None)
    async def get_model(model_id: str) -> Response:  # hub names have slashes
        ctx.require_engine()
        if model_id not in ctx.settings.served_names:
            raise ApiError(404, f"the model `{model_id[:200]}` does not exist", param="model", code="model_not_found")
        return json_response(card(model_id))

    return router
