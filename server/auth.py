"""API keys: kept as SHA-256 hashes, compared in constant time, checked before anything else is read.

The routes under /admin need a key too; where none is set, they are for this machine's own users only.
"""

from __future__ import annotations

import hashlib
import hmac
import ipaddress
from collections.abc import Collection
from urllib.parse import urlsplit

from starlette.datastructures import Headers
from starlette.requests import Request
from starlette.types import ASGIApp, Receive, Scope, Send

from server.errors import ApiError
from server.settings import AppSettings

OPEN_PATHS = frozenset({"/health", "/ready", "/live"})


_FORWARDING = ("forwarded", "x-forwarded-for", "x-real-ip", "via")


def hash_key(key: str) -> bytes:
    return hashlib.sha256(key.encode()).digest()


class KeyCheck:
    """ASGI middleware: 401 unless `Authorization: Bearer <key>` carries one of the keys."""

    def __init__(self, app: ASGIApp, *, key_hashes: Collection[bytes], open_paths: Collection[str]) -> None:
        self._app = app
        self._key_hashes = tuple(key_hashes)
        self._open_paths = frozenset(open_paths)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and scope["path"] not in self._open_paths and not self._allowed(scope):
            await _refusal().response()(scope, receive, send)
            return
        await self._app(scope, receive, send)

    def _allowed(self, scope: Scope) -> bool:
        scheme, _, key = Headers(scope=scope).get("authorization", "").partition(" ")
        if scheme.lower() != "bearer":
            return False
        given = hash_key(key.strip())
        # every hash is compared, so that the time does not tell which one was near
        return sum(hmac.compare_digest(given, known) for known in self._key_hashes) > 0


def check_admin(request: Request, settings: AppSettings) -> None:
    """Raises 403 unless API keys are set, which `KeyCheck` sees to, or the request is from this machine to itself.

    Not from a proxy that says so, nor for a name that a page in a browser made point here.
    """
    if settings.api_key_hashes:
        return
    if any(name in request.headers for name in _FORWARDING) or not _is_loopback(request):
        raise ApiError(
            403,
            "without an API key, admin routes are for requests from the loopback address; start the server with one",
            code="admin_needs_api_key",
        )


def _is_loopback(request: Request) -> bool:
    """The client's address, and what it calls this server."""
    try:
        name = urlsplit(f"//{request.headers.get('host', '')}").hostname or ""
        client = "" if request.client is None else request.client.host
        return ipaddress.ip_address(client).is_loopback and (
            name == "localhost" or ipaddress.ip_address(name).is_loopback
        )
    except ValueError:
        return False


def _refusal() -> ApiError:
    return ApiError(
        401,
        "incorrect or missing API key; send it as `Authorization: Bearer <key>`",
        code="invalid_api_key",
        headers={"WWW-Authenticate": "Bearer"},
    )
