"""Measures a `Calibration` with a real engine of a model on this machine: `foregate calibrate`."""

from __future__ import annotations

import os
import platform
import statistics
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import msgspec

from cache.expert_store import ExpertStore
from cache.trace import RoutingTrace, load
from engine.bench import Workload, bench_prompts
from engine.calibration import Calibration
from engine.checkpoint import Checkpoint
from engine.config import CacheConfig, EngineConfig
from engine.convert import Progress, packed_path
from engine.cost_fit import fit_bookkeeping, fit_combine, fit_foretelling, fit_kernels, fit_phase
from engine.disk_fit import fit_disk
from engine.engine import Engine
from engine.errors import ConfigError
from engine.link_probe import disk_bandwidth, probe_link, read_slowdown
from engine.number_tokenizer import NumberTokenizer
from engine.sampling_params import SamplingParams
from engine.simulate import SimulationSettings
from engine.step_clock import StepClock, StepTimes, replayed_steps
from engine.synthetic import SyntheticCheckpoint
from engine.tokenizer import TokenDecoder
from kernels.backend import choose_backend

_RESIDENT = (
    (1, 96),
    (2, 32),
    (4, 64),
    (8, 16),
    (16, 24),
    (32, 12),
    (2, 240),
    (1, 480),
)  # sequences, tokens of a prompt
_OFFLOADED = ((1, 32), (3, 32))
_SHARE = 0.375  # of the experts that have slots in the offloaded runs
_RESIDENT_TOKENS, _OFFLOADED_TOKENS, _FORETOLD_TOKENS = 10, 20, 12  # of each sequence
_MAX_WARM_UPS = 6
_NUM_WARM_UPS = 4  # steps of the offloaded run that fill the cache


@dataclass(frozen=True, slots=True, kw_only=True)
class Subject:
    """What is calibrated: a checkpoint, or random weights of a known shape."""

    config: EngineConfig
    random_shape: str | None = None
    num_layers: int | None = None
    routing_skew: float = 0.5

    def checkpoint(self) -> Checkpoint:
        if self.random_shape is None:
            return Checkpoint(self.config.model)
        return SyntheticCheckpoint(self.random_shape, self.num_layers, self.config.model, self.routing_skew)

    @property
    def name(self) -> str:
        if self.random_shape is None:
            return self.config.model.resolve().name
        return self.random_shape if self.num_layers is None else f"{self.random_shape}-{self.num_layers}"

    @contextmanager
    def engine(
        self, cache: CacheConfig, clock: StepClock, trace: Path | None = None, progress: Progress | None = None
    ) -> Iterator[Engine]:
        """Observed by the clock; its routing is in `trace` when it is closed."""
        checkpoint = self.checkpoint()
        tokenizer: TokenDecoder | None = NumberTokenizer() if self.random_shape is not None else None
        config = replace(self.config, cache=cache, record_trace=trace)
        num_threads = config.num_threads or len(os.sched_getaffinity(0))
        backend = clock.timed(choose_backend(config.kernels, num_threads))
        engine = Engine(config, progress, checkpoint=checkpoint, tokenizer=tokenizer, backend=backend, observer=clock)
        clock.cache = engine.expert_cache
        try:
            yield engine
        finally:
            engine.close()


def calibration_path(subject: Subject, elsewhere: Path) -> Path:
    """Beside the packed experts; those of random weights are not kept, so that it is `elsewhere`."""
    format = subject.config.resolved(has_experts=True).cache.format
    if subject.random_shape is not None:
        return elsewhere / f"{subject.name}.{format}.json"
    packed = packed_path(subject.checkpoint(), format, subject.config.cache.packed_dir)
    return packed.with_name(f"calibration.{format}.json")


def calibrate(subject: Subject, progress: Progress | None = None) -> Calibration:
    """Measure this machine with this model; packs its experts first where that was not done.

    Raises `ConfigError` for a model without experts, besides what `Engine` raises.
    """
    spec = subject.checkpoint().spec
    if spec.moe is None or not spec.moe.layers:
        raise ConfigError("this model has no experts: there is nothing to simulate")
    config = subject.config.resolved(has_experts=True)
    subject = replace(subject, config=config)
    clock = StepClock()
    with subject.engine(replace(config.cache, predictor="off", memory_nbytes=None), clock, progress=progress) as engine:
        if not engine.expert_cache.holds_all:
            raise ConfigError("calibration needs all experts in memory at first: choose fewer layers of this model")
        num_keys, record_nbytes = engine.stats().expert_cache.num_slots, engine.expert_cache.record_nbytes
        _warm_up(engine, clock)
        for seed, (num_seqs, prompt_tokens) in enumerate(_RESIDENT):
            _serve(engine, clock, _workload(prompt_tokens, _RESIDENT_TOKENS), num_seqs, seed)
        resident = list(clock.steps)
        store = _store(subject)
        try:
            probed = probe_link(store)
            slowed = read_slowdown(store, lambda: _serve(engine, clock, _workload(8, 2 * _RESIDENT_TOKENS), 1, seed=99))
        finally:
            store.close()
    decode, prefill = (fit_phase([step for step in resident if step.is_prefill == is_prefill]) for is_prefill in (0, 1))
    num_slots = max(1, round(_SHARE * num_keys))
    cache = replace(config.cache, memory_nbytes=num_slots * record_nbytes, link_bandwidth=None, host_memory_nbytes=None)
    bandwidths = [measure_disk(subject)]
    run = _offloaded(subject, replace(cache, predictor="off"), _OFFLOADED, _OFFLOADED_TOKENS)
    bandwidths.append(measure_disk(subject))
    foretold = _offloaded(subject, replace(cache, predictor="auto"), _OFFLOADED[:1], _FORETOLD_TOKENS)
    slower, slower_reading = fit_kernels(run.times, decode)
    offload = fit_bookkeeping(run.times, decode)
    offload = msgspec.structs.replace(
        offload,
        read_slowdown=slowed,
        experts_slowdown=slower,
        compute_slowdown=slower_reading,
        foretell_s=fit_foretelling(foretold.times, decode, offload),
    )
    combine_product_s = fit_combine(run.times)
    calibration = Calibration(
        machine=_machine(),
        model=subject.name,
        experts_format=config.cache.format,
        dtype=config.dtype,
        is_measured=True,
        num_layers=len(spec.moe.layers),
        num_experts=spec.moe.num_experts,
        record_nbytes=record_nbytes,
        decode=msgspec.structs.replace(decode, combine_product_s=combine_product_s),
        prefill=msgspec.structs.replace(prefill, combine_product_s=combine_product_s),
        disk=probed.disk,
        offload=offload,
        disk_bandwidth=statistics.mean(bandwidths),
        max_depth=config.cache.num_io_threads,
        host_bandwidth=probed.host_bandwidth,
    )
    settings = SimulationSettings(num_slots=num_slots, policy=config.cache.policy)
    return fit_disk(calibration, settings, run.trace, replayed_steps(run.times, run.trace), _waited_s(run))


def measure_disk(subject: Subject) -> float:
    """`disk_bandwidth` of the subject's packed experts, which must be there."""
    store = _store(subject)
    try:
        return disk_bandwidth(store)
    finally:
        store.close()


def _store(subject: Subject) -> ExpertStore:
    cache = subject.config.cache
    return ExpertStore(packed_path(subject.checkpoint(), cache.format, cache.packed_dir))


def _warm_up(engine: Engine, clock: StepClock) -> None:
    """Prompts until nothing is read any more, but only a few: some experts are hardly ever used."""
    for i in range(_MAX_WARM_UPS):
        before = engine.stats().expert_cache.fetches
        _serve(engine, clock, _workload(256, 2), 1, seed=1_000 + i)
        if engine.stats().expert_cache.fetches == before:
            return


def _workload(prompt_tokens: int, output_tokens: int) -> Workload:
    return Workload(prompt_tokens=prompt_tokens, output_tokens=output_tokens, temperature=1.0)


def _serve(engine: Engine, clock: StepClock, workload: Workload, num_seqs: int, seed: int) -> None:
    for i, prompt in enumerate(bench_prompts(engine, workload, num_seqs, seed)):
        params = SamplingParams(
            temperature=workload.temperature, max_tokens=workload.output_tokens, ignore_eos=True, seed=i
        )
        engine.add_request(f"{seed}-{i}", prompt, params)
    while engine.has_work:
        began = time.perf_counter()
        engine.step()
        clock.steps[-1].began, clock.steps[-1].ended = began, time.perf_counter()


@dataclass(frozen=True, slots=True)
class _OffloadedRun:
    times: list[StepTimes]
    trace: RoutingTrace


def _offloaded(
    subject: Subject, cache: CacheConfig, workloads: Sequence[tuple[int, int]], output_tokens: int
) -> _OffloadedRun:
    clock = StepClock()
    with tempfile.TemporaryDirectory(prefix="foregate-calibrate-") as scratch:
        path = Path(scratch) / "trace.npz"
        with subject.engine(cache, clock, path) as engine:
            for seed, (num_seqs, prompt_tokens) in enumerate(workloads, start=100):
                _serve(engine, clock, _workload(prompt_tokens, output_tokens), num_seqs, seed)
        return _OffloadedRun(clock.steps, load(path))


def _waited_s(run: _OffloadedRun) -> dict[int, list[float]]:
    """What the layers of each decode step waited, once the cache is full."""
    return {
        i: [layer.waited_s for layer in times.layers]
        for i, times in enumerate(run.times)
        if i >= _NUM_WARM_UPS and not times.is_prefill
    }


def _machine() -> str:
    """The CPU's name and how many of it."""
    name = platform.processor() or platform.machine()
    for line in Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []:
        if line.startswith("model name"):
            name = line.partition(":")[2].strip()
            break
    return f"{name}, {len(os.sched_getaffinity(0))} cores"
