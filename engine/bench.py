"""Speed of the engine without HTTP: `foregate bench offline`. Greedy, random prompts, every sequence of one length."""

from __future__ import annotations

import os
import random
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import msgspec
import torch
from torch import Tensor

from engine.config import EngineConfig
from engine.engine import Engine
from engine.number_tokenizer import NumberTokenizer
from engine.sampling_params import SamplingParams
from engine.synthetic import SyntheticCheckpoint
from kernels.backend import Backend, Linear, choose_backend
from kernels.cpu.native import NativeBackend
from kernels.quant.blocked import packed_nbytes

BATCH_SIZES = (1, 2, 4, 8, 16, 32)
_MAX_WARM_UPS = 8
_READ_NBYTES = 256 * 1024**2


class OfflineResult(msgspec.Struct, frozen=True, kw_only=True):
    """One line of the bench. Rates are of all sequences together; medians over steps."""

    num_seqs: int
    prefill_tokens_per_s: float
    decode_tokens_per_s: float
    decode_step_ms: float
    outside_kernels: float  # share of a decode step
    stall: float  # share of a decode step in which compute waited for experts
    hit_rate: float  # of the experts that decode asked for; 1.0 if all are in memory
    read_mb_per_token: float  # of experts, in decode
    of_reading_once: float | None  # speed of one sequence, 1.0 if a step took as long as reading its weights once


@dataclass(frozen=True, slots=True)
class _TimedLinear:
    linear: Linear
    timed: Callable[..., Tensor]

    def __call__(self, x: Tensor, add_to: Tensor | None = None) -> Tensor:
        return self.timed(x, add_to)


class _TimedBackend:
    """Passes calls on and counts the seconds spent in them."""

    def __init__(self, backend: Backend) -> None:
        self.inner = backend
        self.name = backend.name
        self.device = backend.device
        self.seconds = 0.0
        self.dense_nbytes = 0
        for name in ("rms_norm", "expert_mlp", "combine"):
            setattr(self, name, self._timed(getattr(backend, name)))
        for name in ("make_attention", "make_router", "make_mlp"):
            setattr(self, name, self._making_timed(getattr(backend, name)))

    def make_linear(self, weight: Tensor, bias: Tensor | None, format: str) -> Linear:
        linear = self.inner.make_linear(weight, bias, format)
        self.dense_nbytes += packed_nbytes(format, *weight.shape)
        return _TimedLinear(linear, self._timed(linear))

    def _making_timed(self, make: Callable[..., Any]) -> Callable[..., Any]:
        return lambda *args: self._timed(make(*(a.linear if isinstance(a, _TimedLinear) else a for a in args)))

    def _timed(self, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            started = time.perf_counter()
            try:
                return function(*args, **kwargs)
            finally:
                self.seconds += time.perf_counter() - started

        return call


@dataclass(frozen=True, slots=True, kw_only=True)
class Workload:
    """What each sequence is given and asked for."""

    prompt_tokens: int = 128
    output_tokens: int = 64
    temperature: float = 0.0  # random weights repeat themselves at 0, and then need few experts
    top_p: float = 1.0


def bench_offline(
    config: EngineConfig,
    workload: Workload,
    *,
    random_shape: str | None = None,
    num_layers: int | None = None,
    routing_skew: float = 0.0,
    batch_sizes: Sequence[int] = BATCH_SIZES,
    progress: Callable[[str, int, int], None] | None = None,
) -> Iterator[OfflineResult]:
    """Measure each batch size in turn. `random_shape` takes the place of config.model by random weights."""
    scheduler = replace(config.scheduler, max_num_seqs=max(batch_sizes))
    with _engine(replace(config, scheduler=scheduler), random_shape, num_layers, routing_skew, progress) as (
        engine,
        backend,
    ):
        _warm_up(engine, backend, workload)
        for num_seqs in batch_sizes:
            yield _run(engine, backend, num_seqs, workload, seed=num_seqs)


def _warm_up(engine: Engine, backend: _TimedBackend, workload: Workload) -> None:
    """Short runs until a run reads no experts any more; but only a few, where they do not all fit."""
    for i in range(_MAX_WARM_UPS):
        before = engine.stats().expert_cache.fetches
        _run(engine, backend, 1, replace(workload, output_tokens=4), seed=10_000 + i)
        if engine.stats().expert_cache.fetches == before:
            break


@contextmanager
def _engine(
    config: EngineConfig,
    random_shape: str | None,
    num_layers: int | None,
    routing_skew: float,
    progress: Callable[[str, int, int], None] | None,
) -> Iterator[tuple[Engine, _TimedBackend]]:
    threads = config.num_threads or len(os.sched_getaffinity(0))
    backend = _TimedBackend(choose_backend(config.kernels, threads))
    with tempfile.TemporaryDirectory(prefix="foregate-bench-") as scratch:
        if random_shape is None:
            engine = Engine(config, progress, backend=backend)  # type: ignore[arg-type]  # methods are set, not defined
        else:
            checkpoint = SyntheticCheckpoint(random_shape, num_layers, Path(scratch), routing_skew)
            config = replace(config, model=Path(scratch), cache=replace(config.cache, packed_dir=None))
            engine = Engine(
                config,
                progress,
                checkpoint=checkpoint,
                tokenizer=NumberTokenizer(),
                backend=backend,  # type: ignore[arg-type]
            )
        try:
            yield engine, backend
        finally:
            engine.close()


def bench_prompts(engine: Engine, workload: Workload, num_seqs: int, seed: int) -> list[list[int]]:
    """Random token ids."""
    rng = random.Random(seed)
    return [[rng.randrange(engine.info.vocab_size) for _ in range(workload.prompt_tokens)] for _ in range(num_seqs)]


def _run(engine: Engine, backend: _TimedBackend, num_seqs: int, workload: Workload, seed: int) -> OfflineResult:
    params = SamplingParams(
        temperature=workload.temperature,
        top_p=workload.top_p,
        max_tokens=workload.output_tokens,
        ignore_eos=True,
        seed=seed,
    )
    for i, prompt in enumerate(bench_prompts(engine, workload, num_seqs, seed)):
        engine.add_request(f"bench{seed}-{i}", prompt, params)
    started = time.perf_counter()
    while any(request.num_output_tokens == 0 for request in engine.scheduler.requests):
        engine.step()
    prefill_s = time.perf_counter() - started
    steps, outside, stalls = [], [], []
    cache_before = engine.stats().expert_cache
    reading_s = _reading_s(engine, backend) if num_seqs == 1 else None
    while engine.has_work:
        before, kernels_before = _stall_s(engine), backend.seconds
        started = time.perf_counter()
        engine.step()
        steps.append(time.perf_counter() - started)
        stall = _stall_s(engine) - before
        stalls.append(stall / steps[-1])
        outside.append(1.0 - (backend.seconds - kernels_before + stall) / steps[-1])
    cache = engine.stats().expert_cache
    queries = cache.decode.queries - cache_before.decode.queries
    num_tokens = num_seqs * (workload.output_tokens - 1)
    step_s = statistics.median(steps) if steps else float("nan")
    return OfflineResult(
        num_seqs=num_seqs,
        prefill_tokens_per_s=num_seqs * workload.prompt_tokens / prefill_s,
        decode_tokens_per_s=num_seqs / step_s,
        decode_step_ms=step_s * 1e3,
        outside_kernels=statistics.median(outside) if outside else float("nan"),
        stall=statistics.median(stalls) if stalls else float("nan"),
        hit_rate=(cache.decode.hits - cache_before.decode.hits) / queries if queries else 1.0,
        read_mb_per_token=(cache.fetched_nbytes - cache_before.fetched_nbytes) / 1e6 / num_tokens,
        of_reading_once=None if reading_s is None else reading_s / step_s,
    )


def _reading_s(engine: Engine, backend: _TimedBackend) -> float | None:
    """Seconds to read what one token needs, all dense weights and its experts, at the speed of memory now."""
    if not isinstance(backend.inner, NativeBackend):
        return None
    memory = torch.ones(_READ_NBYTES, dtype=torch.uint8)  # not zeros: unwritten pages are all one page
    times = []
    for _ in range(5):
        started = time.perf_counter()
        backend.inner.read(memory)
        times.append(time.perf_counter() - started)
    return (backend.dense_nbytes + engine.token_experts_nbytes) / memory.numel() * statistics.median(times)


def _stall_s(engine: Engine) -> float:
    stats = engine.stats().expert_cache
    return stats.prefill.stall_s + stats.decode.stall_s
