"""Checkpoints made once a session, and engines on them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from engine.config import CacheConfig, EngineConfig, SchedulerConfig
from engine.engine import Engine
from engine.messages import RequestOutput
from engine.sampling_params import SamplingParams
from tests.engine.tiny_models import make_checkpoint

MakeEngine = Callable[..., Engine]


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[Path, torch.nn.Module]]:
    made: dict[str, tuple[Path, torch.nn.Module]] = {}

    def make(variant: str) -> tuple[Path, torch.nn.Module]:
        if variant not in made:
            directory = tmp_path_factory.mktemp(variant)
            made[variant] = directory, make_checkpoint(directory, variant)
        return made[variant]

    return make


@pytest.fixture
def make_engine() -> Iterator[MakeEngine]:
    """Engines that are checked for integrity and closed at the end of the test."""
    engines: list[Engine] = []

    def make(
        directory: Path, *, cache: dict[str, Any] | None = None, scheduler: dict[str, Any] | None = None, **kw: Any
    ) -> Engine:
        config = EngineConfig(
            model=directory,
            kv_memory_nbytes=kw.pop("kv_memory_nbytes", 16 * 1024**2),
            max_model_len=kw.pop("max_model_len", 256),
            cache=replace(CacheConfig(format="float32"), **(cache or {})),
            scheduler=replace(SchedulerConfig(), **(scheduler or {})),
            **kw,
        )
        engines.append(Engine(config))
        return engines[-1]

    yield make
    for engine in engines:
        engine.check_integrity()
        engine.close()


def run_all(engine: Engine, requests: dict[str, tuple[list[int], SamplingParams]]) -> dict[str, list[RequestOutput]]:
    """Add all requests, step until done; outputs by request."""
    outputs: dict[str, list[RequestOutput]] = {request_id: [] for request_id in requests}
    for request_id, (prompt, params) in requests.items():
        engine.add_request(request_id, prompt, params)
    while engine.has_work:
        for output in engine.step():
            outputs[output.request_id].append(output)
    return outputs


def tokens_of(outputs: list[RequestOutput]) -> list[int]:
    return [token_id for output in outputs for token_id in output.token_ids]


def greedy(max_tokens: int, **kwargs: Any) -> SamplingParams:
    return SamplingParams(temperature=0.0, max_tokens=max_tokens, ignore_eos=True, **kwargs)
