"""GET /v1/experts/stats: of each expert of each layer, how often it was asked for and found, and where it is now."""

from __future__ import annotations

import sys
from array import array
from typing import Annotated, Any

import msgspec
from fastapi import APIRouter, Response
from pydantic import BaseModel, Field

from cache.expert_table import RESIDENCY, ExpertTable
from server.context import AppContext

_EMPTY = ExpertTable(layers=[], num_experts=0, half_life_s=0.0, queries=b"", hits=b"", recent=b"", residency=b"")

Counts = list[list[int]]


class ExpertTotals(BaseModel):
    """Over all layers."""

    experts: int
    queries: int
    hits: int
    misses: int
    residency: Annotated[dict[str, int], Field(description="How many experts are where.")]


class ExpertsStats(BaseModel):
    """Tables are lists of layers, each a list of experts. For a model without experts they are empty."""

    object: str = "experts.stats"
    model: str
    layers: Annotated[list[int], Field(description="The model's numbers of the layers with experts.")]
    num_experts: Annotated[int, Field(description="Experts of each layer.")]
    queries: Annotated[Counts, Field(description="Times that a step asked for the expert, since the start.")]
    hits: Annotated[Counts, Field(description="Of these, times that it was in the top tier. The rest are misses.")]
    recent: Annotated[
        list[list[float]], Field(description="Queries of late: each counts half as much after `half_life_s`.")
    ]
    half_life_s: float
    residency: Annotated[Counts, Field(description="Index into `residency_names`: the fastest tier it is ready in.")]
    residency_names: list[str]
    totals: ExpertTotals


def experts_router(ctx: AppContext) -> APIRouter:
    router = APIRouter()

    @router.get("/v1/experts/stats", response_model=None, responses={200: {"model": ExpertsStats}})
    async def experts_stats() -> Response:
        """Answered between two steps of the engine; costs it about a millisecond for 10,000 experts."""
        ctx.require_engine()
        table = await ctx.engine.expert_table() or _EMPTY
        body = msgspec.json.encode(_described(table, ctx.settings.served_names[0]))
        return Response(body, media_type="application/json", headers={"Cache-Control": "no-store"})

    return router


def _described(table: ExpertTable, model: str) -> dict[str, Any]:
    queries, hits = _numbers("Q", table.queries), _numbers("Q", table.hits)
    recent = [round(uses, 2) for uses in _numbers("f", table.recent)]
    residency = list(table.residency)

    def rows(flat: list[Any]) -> list[list[Any]]:
        width = table.num_experts
        return [flat[row * width : (row + 1) * width] for row in range(len(table.layers))]

    return {
        "object": "experts.stats",
        "model": model,
        "layers": table.layers,
        "num_experts": table.num_experts,
        "queries": rows(queries),
        "hits": rows(hits),
        "recent": rows(recent),
        "half_life_s": table.half_life_s,
        "residency": rows(residency),
        "residency_names": RESIDENCY,
        "totals": {
            "experts": len(residency),
            "queries": sum(queries),
            "hits": sum(hits),
            "misses": sum(queries) - sum(hits),
            "residency": {name: residency.count(number) for number, name in enumerate(RESIDENCY)},
        },
    }


def _numbers(kind: str, packed: bytes) -> list[Any]:
    numbers: array[Any] = array(kind, packed)
    if sys.byteorder == "big":
        numbers.byteswap()
    return numbers.tolist()
