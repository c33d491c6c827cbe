"""API keys: kept as SHA-256 hashes, compared in constant time, checked before anything else is read."""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Collection

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from server.errors import ApiError

OPEN_PATHS = frozenset({"/health", "/ready", "/live"})


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


def _refusal() -> ApiError:
    return ApiError(
        401,
        "incorrect or missing API key; send it as `Authorization: Bearer <key>`",
        code="invalid_api_key",
        headers={"WWW-Authenticate": "Bearer"},
    )
