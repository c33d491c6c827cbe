"""The engine as the HTTP layer sees it. `AsyncEngine` is one; tests script another."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from typing import Any, Protocol

from cache.expert_table import ExpertTable
from engine.messages import CacheAction, EngineStats, ModelInfo, RequestOutput, TraceRecorded
from engine.sampling_params import SamplingParams


class Engine(Protocol):
    """What requests need. Errors are those of `engine.errors`."""

    @property
    def info(self) -> ModelInfo: ...

    def check_room(self) -> None: ...

    async def render_chat(
        self,
        messages: list[dict[str, Any]],
        *,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        tools: list[dict[str, Any]] | None = None,
        variables: dict[str, Any] | None = None,
    ) -> list[int]: ...

    async def encode(self, text: str) -> list[int]: ...

    async def decode(self, token_ids: list[int]) -> str: ...

    def generate(
        self, request_id: str, prompt_token_ids: list[int], params: SamplingParams
    ) -> AsyncIterator[RequestOutput]: ...

    async def record_trace(self, *, seconds: float, max_tokens: int, domain: str) -> TraceRecorded: ...

    def end_trace(self) -> bool: ...

    async def integrity_error(self) -> str | None: ...

    async def expert_table(self) -> ExpertTable | None: ...

    async def control_cache(self, action: CacheAction, experts: Sequence[tuple[int, int]] | None = None) -> int: ...

    def abort(self, request_id: str) -> int: ...

    def stats(self) -> EngineStats: ...


class StartableEngine(Engine, Protocol):
    """What running a server needs besides."""

    async def start(self) -> None: ...

    async def stop(self, *, drain_s: float = 0.0) -> None: ...
