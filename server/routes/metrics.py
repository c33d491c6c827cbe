"""GET /metrics, in the format that the scraper asks for."""

from __future__ import annotations

from fastapi import APIRouter, Request, Response
from prometheus_client.exposition import choose_encoder

from server.context import AppContext
from server.openapi import other_answer


def metrics_router(ctx: AppContext) -> APIRouter:
    router = APIRouter()

    @router.get("/metrics", openapi_extra=other_answer("text/plain"), response_model=None)
    async def metrics(request: Request) -> Response:
        """Prometheus' text format, or OpenMetrics' for who asks for it."""
        encode, content_type = choose_encoder(request.headers.get("accept", ""))
        return Response(encode(ctx.metrics.registry), headers={"Content-Type": content_type})

    return router
