"""GET /, /dashboard and /docs: pages of our own files, which have no secrets in them. What they show needs the key.

/docs is Swagger UI on /openapi.json, vendored: nothing is fetched elsewhere.
"""

from __future__ import annotations

import gzip
import hashlib
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Final

from fastapi import APIRouter, Request, Response

from server.context import AppContext
from server.errors import ApiError

_STATIC = Path(__file__).parents[1] / "static"
_KINDS = {".html": "text/html", ".css": "text/css", ".js": "text/javascript", ".svg": "image/svg+xml"}
_PAGES = {"/": "chat.html", "/dashboard": "dashboard.html", "/docs": "docs.html"}
_ASSETS = (
    "page.css",
    "live.css",
    "chat.css",
    "icon.svg",
    "session.js",
    "markdown.js",
    "chat.js",
    "echarts.min.js",
    "plots.js",
    "heatmap.js",
    "dashboard.css",
    "dashboard.js",
    "swagger-ui.css",
    "swagger-ui-bundle.js",
    "docs.css",
    "docs.js",
)
PAGE_PATHS: Final = frozenset([*_PAGES, *(f"/static/{name}" for name in _ASSETS)])
"""What needs no key."""

_POLICY = "default-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'; object-src 'none'"
# Swagger UI styles its elements one by one, and has its pictures in its style sheet
_POLICIES = {"docs.html": f"{_POLICY}; style-src 'self' 'unsafe-inline'; img-src 'self' data:"}
_HEADERS = {
    "Content-Security-Policy": _POLICY,
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cache-Control": "no-cache",  # but it may be kept: the tag says whether it is still the same
    "Vary": "Accept-Encoding",
}


def pages_router(ctx: AppContext) -> APIRouter:
    router = APIRouter(include_in_schema=False)
    for path, name in _PAGES.items():
        router.add_api_route(path, _page(name), methods=["GET", "HEAD"], response_model=None)

    @router.api_route("/static/{name}", methods=["GET", "HEAD"], response_model=None)
    async def asset(name: str, request: Request) -> Response:
        if name not in _ASSETS:
            raise ApiError(404, "there is no such file", code="not_found")
        return _answer(name, request)

    return router


def _page(name: str) -> Callable[[Request], Response]:
    async def page(request: Request) -> Response:
        return _answer(name, request)

    return page  # type: ignore[return-value]


def _answer(name: str, request: Request) -> Response:
    plain, packed, tag = _file(name)
    headers = {**_HEADERS, "ETag": tag}
    if name in _POLICIES:
        headers["Content-Security-Policy"] = _POLICIES[name]
    if tag in request.headers.get("if-none-match", ""):
        return Response(status_code=304, headers=headers)
    if "gzip" in request.headers.get("accept-encoding", ""):
        headers["Content-Encoding"] = "gzip"
        plain = packed
    return Response(plain, media_type=_KINDS[Path(name).suffix], headers=headers)


@cache
def _file(name: str) -> tuple[bytes, bytes, str]:
    """Its bytes, the same packed, and what tells it from another version. Read once: an update restarts the server."""
    plain = (_STATIC / name).read_bytes()
    return plain, gzip.compress(plain, mtime=0), f'W/"{hashlib.sha256(plain).hexdigest()[:16]}"'
