"""What every route is given: the engine, the settings, the metrics, and whether the server is going away."""

from __future__ import annotations

import asyncio
import hashlib
import os
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Final

from engine.errors import EngineDead
from server.engine_face import Engine
from server.errors import ApiError, Unavailable
from server.history import History
from server.metrics import ServerMetrics
from server.request_log import RequestLog
from server.settings import AppSettings

VERSION: Final = version("foregate")


class Lifecycle:
    """Set by whoever runs the server: from `draining` on it is not ready, though requests are still served."""

    def __init__(self) -> None:
        self.draining = False
        self.refusing = False  # new requests too: an administrator drains it
        self.stopping = False  # for good
        self.startup_s: float | None = None  # from the process's start until the engine was ready

    def loaded(self) -> None:
        """The engine is ready for the first time."""
        self.startup_s = _process_age_s()


class SeenNames:
    """Names met so far, at most `limit` of them, so that a client cannot fill the log or the memory."""

    def __init__(self, limit: int = 256) -> None:
        self._limit = limit
        self._names: set[str] = set()

    def is_new(self, name: str) -> bool:
        if len(self._names) >= self._limit or name in self._names:
            return False
        self._names.add(name)
        return True


@dataclass(frozen=True, slots=True)
class AppContext:
    engine: Engine
    settings: AppSettings
    metrics: ServerMetrics
    lifecycle: Lifecycle
    requests: RequestLog
    history: History
    now: Callable[[], float] = time.time  # for `created`
    clock: Callable[[], float] = time.monotonic  # for durations
    large_bodies: asyncio.Semaphore = field(default_factory=lambda: asyncio.Semaphore(1))  # that are parsed at once
    unknown_fields: SeenNames = field(default_factory=SeenNames)

    @property
    def state(self) -> str:
        """The engine's state, "stalled" if it has work and makes no step, or "draining" as soon as that begins."""
        stats = self.engine.stats()
        if stats.state in ("ready", "draining") and stats.last_step_age_s > self.settings.stall_timeout_s:
            return "stalled"
        return "draining" if self.lifecycle.draining and stats.state == "ready" else stats.state

    def require_engine(self) -> None:
        """Raises `Unavailable` while the model loads and `EngineDead` when it cannot serve any more."""
        state = self.engine.stats().state
        if state in ("loading", "stopped"):
            self.metrics.reject("loading")
            raise Unavailable("the model is still loading", code="loading", retry_after_s=2.0)
        if state == "draining" or (state == "ready" and self.lifecycle.refusing):
            self.metrics.reject("draining")
            raise Unavailable("the server is shutting down", code="shutting_down", retry_after_s=5.0)
        if state == "restarting":
            self.metrics.reject("restarting")
            raise Unavailable("the engine has failed and is being started again", code="restarting", retry_after_s=5.0)
        if state == "dead":
            raise EngineDead("the engine has stopped working")

    def require_room(self) -> None:
        """Raises what `require_engine` does, and `EngineOverloaded` while the queue is full, before a body is read."""
        self.require_engine()
        self.engine.check_room()

    def served_name(self, requested: str | None) -> str:
        """The model name to answer with; raises 404 `model_not_found`."""
        if requested is None:
            return self.settings.served_names[0]
        if requested in self.settings.served_names or self.settings.accept_any_model_name:
            return requested
        raise ApiError(404, f"the model `{requested[:200]}` does not exist", param="model", code="model_not_found")

    def fingerprint(self) -> str:
        """Same fingerprint, same version and same numerical settings."""
        info = self.engine.info
        text = f"{VERSION} {info.name} {info.model_type} {info.dtype} {info.expert_format}"
        return f"fg_{hashlib.sha256(text.encode()).hexdigest()[:12]}"


def _process_age_s() -> float | None:
    """None where the system does not tell."""
    try:
        stat = Path("/proc/self/stat").read_text(encoding="ascii", errors="replace")
    except FileNotFoundError:
        return None
    started_s = float(stat.rpartition(")")[2].split()[19]) / os.sysconf("SC_CLK_TCK")  # field 22, since boot
    return time.clock_gettime(time.CLOCK_BOOTTIME) - started_s
