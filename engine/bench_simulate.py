"""Is the simulation right? Predicted beside measured, on settings that it was not calibrated on."""

from __future__ import annotations

import statistics
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path

import msgspec

from cache.replay import Step
from cache.trace import RoutingTrace, load
from engine.bench import Workload
from engine.bench_offload import OFF, ORACLE, WARM_UP_TOKENS, OffloadRun, RoutingLog, make_oracle, run_workload
from engine.calibrate import Subject, calibrate, measure_disk
from engine.calibration import Calibration
from engine.config import EngineConfig
from engine.convert import Progress
from engine.disk_fit import slower
from engine.simulate import PhaseResult, SimulationSettings, simulate
from engine.step_clock import StepClock, replayed_steps

TOLERANCE = 0.15
_NUM_RUNS = 2  # of the engine in each setting: what else wants the machine only adds to its time
_WORKLOAD = Workload(prompt_tokens=64, output_tokens=32, temperature=1.0)


class Validation(msgspec.Struct, frozen=True, kw_only=True):
    """One setting: the steps of decode after the warm-up, as simulated and as measured."""

    memory_share: float
    num_seqs: int
    link_gib_per_s: float | None  # None: the disk as it is
    predictor: str
    predicted_tokens_per_s: float
    measured_tokens_per_s: float
    predicted_p50_ms: float  # of a step
    measured_p50_ms: float
    predicted_stall_share: float
    measured_stall_share: float
    predicted_hit_rate: float
    measured_hit_rate: float

    @property
    def ratio(self) -> float:
        """Predicted / measured speed."""
        return self.predicted_tokens_per_s / self.measured_tokens_per_s

    @property
    def is_within(self) -> bool:
        return abs(self.ratio - 1.0) <= TOLERANCE


def bench_simulate(
    config: EngineConfig,
    *,
    random_shape: str | None = None,
    num_layers: int | None = None,
    routing_skew: float = 0.0,
    workload: Workload = _WORKLOAD,
    memory_shares: Sequence[float] = (0.5, 0.25),
    num_seqs: Sequence[int] = (1, 4, 8),
    links: Sequence[float | None] = (None, 8 * 1024.0**3),
    predictors: Sequence[str] = (OFF, ORACLE),
    calibration: Calibration | None = None,
    progress: Progress | None = None,
) -> Iterator[Validation]:
    """Calibrate, then each setting in the engine and in the simulation, with the routing of a resident run.

    The engine runs twice, and the faster counts. The disk is measured again around each run: the simulated one is as
    much faster or slower than it was when the calibration was made. `calibration`: one of this machine and model,
    instead of a new one.
    """
    with tempfile.TemporaryDirectory(prefix="foregate-bench-") as scratch:
        if random_shape is not None:
            cache = replace(config.cache, packed_dir=Path(scratch))
            config = replace(config, model=Path(scratch) / "random", cache=cache)
        config = config.resolved(has_experts=True)
        subject = Subject(config=config, random_shape=random_shape, num_layers=num_layers, routing_skew=routing_skew)
        costs = calibration or calibrate(subject, progress)
        for seqs in num_seqs:
            routed = _routed(subject, workload, seqs, Path(scratch) / f"trace-{seqs}.npz")
            for share, link, predictor in product(memory_shares, links, predictors):
                settings = SimulationSettings(
                    num_slots=max(1, round(share * routed.trace.num_keys)),
                    policy=config.cache.policy,
                    predictor=predictor if predictor in (OFF, ORACLE) else "auto",
                    concurrency=seqs,
                    link_bandwidth=link,
                )
                bandwidths, runs = [measure_disk(subject)], []
                for _ in range(_NUM_RUNS):
                    runs.append(_measured(subject, workload, settings, predictor, costs.record_nbytes, routed.log))
                    bandwidths.append(measure_disk(subject))
                now = statistics.mean(bandwidths)
                simulated = routed.simulated(slower(costs, (costs.disk_bandwidth or now) / now), settings)
                fastest = min(runs, key=lambda run: sum(run.step_s))
                yield _validation(share, settings, predictor, simulated, fastest)


@dataclass(frozen=True, slots=True)
class _Routed:
    """What a run with all experts in memory was routed to."""

    trace: RoutingTrace
    steps: list[Step]
    log: RoutingLog

    def simulated(self, costs: Calibration, settings: SimulationSettings) -> PhaseResult:
        result = simulate(self.trace, costs, settings, steps=lambda: self.steps, num_warm_ups=WARM_UP_TOKENS)
        return result.decode


def _routed(subject: Subject, workload: Workload, num_seqs: int, path: Path) -> _Routed:
    log, clock = RoutingLog(), StepClock()
    with subject.engine(replace(subject.config.cache, predictor=OFF, memory_nbytes=None), clock, path) as engine:
        engine.observe(log)
        run_workload(engine, workload, num_seqs)
    trace = load(path)
    return _Routed(trace, replayed_steps(clock.steps, trace), log)


def _measured(
    subject: Subject,
    workload: Workload,
    settings: SimulationSettings,
    predictor: str,
    record_nbytes: int,
    log: RoutingLog,
) -> OffloadRun:
    cache = replace(
        subject.config.cache,
        memory_nbytes=settings.num_slots * record_nbytes,
        link_bandwidth=settings.link_bandwidth,
        predictor=OFF if predictor == ORACLE else predictor,
    )
    with subject.engine(cache, StepClock()) as engine:
        if predictor == ORACLE:
            engine.observe(make_oracle(engine, log))
        return run_workload(engine, workload, settings.concurrency)


def _validation(
    share: float, settings: SimulationSettings, predictor: str, simulated: PhaseResult, run: OffloadRun
) -> Validation:
    seconds = sum(run.step_s)
    before, after = run.before.decode, run.after.decode
    link = settings.link_bandwidth
    return Validation(
        memory_share=share,
        num_seqs=settings.concurrency,
        link_gib_per_s=None if link is None else link / 1024**3,
        predictor=predictor,
        predicted_tokens_per_s=simulated.tokens_per_s,
        measured_tokens_per_s=len(run.step_s) * settings.concurrency / seconds,
        predicted_p50_ms=simulated.step_p50_ms,
        measured_p50_ms=1e3 * statistics.median(run.step_s),
        predicted_stall_share=simulated.stall_share,
        measured_stall_share=(after.stall_s - before.stall_s) / seconds,
        predicted_hit_rate=simulated.hit_rate,
        measured_hit_rate=(after.hits - before.hits) / max(1, after.queries - before.queries),
    )
