"""GET /docs: /openapi.json to read and to try out, by Swagger UI from our own files; nothing is fetched elsewhere."""

from __future__ import annotations

from pathlib import Path

from fastapi import APIRouter, Response

from server.context import AppContext
from server.errors import ApiError

_STATIC = Path(__file__).parents[1] / "static"
_ASSETS = {"swagger-ui-bundle.js": "text/javascript", "swagger-ui.css": "text/css", "swagger.js": "text/javascript"}
_HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self' 'unsafe-inline'; "
    "img-src 'self' data:; connect-src 'self'; frame-ancestors 'none'; base-uri 'none'",
    "X-Content-Type-Options": "nosniff",
    "Cache-Control": "no-cache",
}
_PAGE = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>Foregate API</title>
<link rel="icon" href="data:,"><link rel="stylesheet" href="docs/swagger-ui.css">
</head>
<body>
<div id="swagger-ui"></div>
<script src="docs/swagger-ui-bundle.js"></script><script src="docs/swagger.js"></script>
</body>
</html>
"""


def docs_router(ctx: AppContext) -> APIRouter:
    router = APIRouter(include_in_schema=False)

    @router.get("/docs", response_model=None)
    async def docs() -> Response:
        return Response(_PAGE, media_type="text/html", headers=_HEADERS)

    @router.get("/docs/{name}", response_model=None)
    async def asset(name: str) -> Response:
        if name not in _ASSETS:
            raise ApiError(404, "there is no such route", code="not_found")
        return Response((_STATIC / name).read_bytes(), media_type=_ASSETS[name], headers=_HEADERS)

    return router
