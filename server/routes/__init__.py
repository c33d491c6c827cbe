"""The routes. A new endpoint is one file here and one line in `ROUTERS`."""

from __future__ import annotations

from collections.abc import Callable

from fastapi import APIRouter

from server.context import AppContext
from server.routes.admin import admin_router
from server.routes.chat import chat_router
from server.routes.completions import completions_router
from server.routes.dashboard import dashboard_router
from server.routes.experts import experts_router
from server.routes.health import health_router
from server.routes.metrics import metrics_router
from server.routes.models import models_router
from server.routes.operate import operate_router
from server.routes.pages import pages_router
from server.routes.tokenize import tokenize_router

ROUTERS: dict[str, Callable[[AppContext], APIRouter]] = {
    "chat": chat_router,
    "completions": completions_router,
    "models": models_router,
    "tokenize": tokenize_router,
    "experts": experts_router,
    "dashboard": dashboard_router,
    "pages": pages_router,
    "health": health_router,
    "metrics": metrics_router,
    "admin": admin_router,
    "operate": operate_router,
}
