"""Steps, layers, links and tiers in simulated time: the engine's own cache and prefetcher decide, costs are numbers."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable, Sequence
from functools import partial

import msgspec
import numpy as np

from cache.certain_prefetch import CertainPrefetch
from cache.expert_cache import ExpertCache
from cache.expert_key import ExpertKey
from cache.expert_store import ExpertStore
from cache.layer_stream import LayerStream
from cache.lease import Phase
from cache.packed_file import PackedHeader
from cache.prefetcher import Prefetcher
from cache.replay import Step, make_policy, schedule
from cache.slot_pool import SlotPool
from cache.trace import RoutingTrace
from engine.calibration import Calibration, PhaseCost
from engine.errors import ConfigError
from engine.simulated_predictor import MAX_RECALL_LOSS, ForetellingPrefetch
from engine.simulated_transfer import Arrival, SimulatedHost, SimulatedTransfer

PREDICTORS = ("off", "stream", "oracle", "auto")

Steps = Callable[[], Iterable[Step]]


class SimulationSettings(msgspec.Struct, frozen=True, kw_only=True):
    """What is asked about. `predictor` auto: one whose `recall` and `precision` are those of a layer ahead, and, as in
    `stream` alone, whole layers where most of their experts are needed."""

    num_slots: int
    policy: str = "segment"
    predictor: str = "off"
    concurrency: int = 1
    prefill_chunk: int = 512
    link_bandwidth: float | None = None  # bytes/s; None: the calibration's own
    host_slots: int = 0  # of a tier between; 0: there is none
    warm_host: bool = False  # it is full from the start
    exclusive_tiers: bool = False
    recall: float = 0.85
    precision: float = 0.85

    def check(self) -> None:
        """Raise `ConfigError` for what cannot be simulated."""
        if self.predictor not in PREDICTORS:
            raise ConfigError(f"unknown predictor {self.predictor!r}; known: {', '.join(PREDICTORS)}")
        if not (MAX_RECALL_LOSS < self.recall <= 1.0 and 0.0 < self.precision <= 1.0):
            raise ConfigError(f"recall is above {MAX_RECALL_LOSS:g}, precision above 0, and neither is above 1")
        if self.link_bandwidth is not None and self.link_bandwidth <= 0:
            raise ConfigError("a link that carries nothing brings no expert")


class PhaseResult(msgspec.Struct, frozen=True, kw_only=True):
    """The steps with a prompt chunk in them, or the others. Shares are fractions; all 0 if there were none."""

    num_steps: int = 0
    num_tokens: int = 0
    tokens_per_s: float = 0.0
    step_ms: float = 0.0  # mean
    step_p50_ms: float = 0.0
    step_p99_ms: float = 0.0
    stall_share: float = 0.0  # of the time
    hit_rate: float = 0.0
    read_mb_per_token: float = 0.0


class SimulationResult(msgspec.Struct, frozen=True, kw_only=True):
    """One setting on one machine. Nothing in it was measured; `is_measured` is of the costs it was made from."""

    machine: str
    is_measured: bool
    settings: SimulationSettings
    output_tokens_per_s: float  # beyond the prompts, of the whole time
    decode: PhaseResult
    prefill: PhaseResult


class SimulatedStep(msgspec.Struct, frozen=True):
    """One step. `queries` and `hits` as in `cache.stats.PhaseStats`."""

    is_prefill: bool
    num_rows: int
    num_output_rows: int
    seconds: float
    stall_s: float
    num_reads: int
    queries: int
    hits: int
    layer_stall_s: tuple[float, ...]  # of each layer with experts


def simulate(
    trace: RoutingTrace,
    calibration: Calibration,
    settings: SimulationSettings,
    *,
    steps: Steps | None = None,
    num_warm_ups: int = 0,
    seed: int = 0,
) -> SimulationResult:
    """The trace served with these settings, from an empty cache; its first `num_warm_ups` steps are not counted.

    `steps`: makes an iterator of the steps, instead of those of `cache.replay.schedule`. `seed` is of the predictor's
    mistakes. Raises `ConfigError` for settings that cannot be, or where trace and calibration are of different models.
    """
    times = simulated_steps(trace, calibration, settings, steps=steps, seed=seed)[num_warm_ups:]
    nbytes = calibration.record_nbytes
    total_s = sum(step.seconds for step in times)
    return SimulationResult(
        machine=calibration.machine,
        is_measured=calibration.is_measured,
        settings=settings,
        output_tokens_per_s=sum(step.num_output_rows for step in times) / total_s if total_s else 0.0,
        decode=_phase([step for step in times if not step.is_prefill], nbytes),
        prefill=_phase([step for step in times if step.is_prefill], nbytes),
    )


def simulated_steps(
    trace: RoutingTrace,
    calibration: Calibration,
    settings: SimulationSettings,
    *,
    steps: Steps | None = None,
    seed: int = 0,
) -> list[SimulatedStep]:
    """As `simulate`, but each step on its own; without those that have no tokens."""
    calibration.check(trace)
    settings.check()
    make_steps = steps or partial(schedule, trace, settings.concurrency, settings.prefill_chunk)
    try:
        simulation = _Simulation(trace, calibration, settings, make_steps, seed)
        return [simulation.step(step) for step in make_steps() if step.rows]
    except ValueError as error:
        raise ConfigError(str(error)) from error


def _phase(times: Sequence[SimulatedStep], record_nbytes: int) -> PhaseResult:
    if not times:
        return PhaseResult()
    seconds = [step.seconds for step in times]
    num_tokens = sum(step.num_rows for step in times)
    return PhaseResult(
        num_steps=len(times),
        num_tokens=num_tokens,
        tokens_per_s=num_tokens / sum(seconds),
        step_ms=1e3 * sum(seconds) / len(seconds),
        step_p50_ms=1e3 * statistics.median(seconds),
        step_p99_ms=1e3 * float(np.percentile(seconds, 99)),
        stall_share=sum(step.stall_s for step in times) / sum(seconds),
        hit_rate=sum(step.hits for step in times) / max(1, sum(step.queries for step in times)),
        read_mb_per_token=sum(step.num_reads for step in times) * record_nbytes / 1e6 / num_tokens,
    )


class _Simulation:
    def __init__(
        self, trace: RoutingTrace, calibration: Calibration, settings: SimulationSettings, steps: Steps, seed: int
    ) -> None:
        self._trace = trace
        self._calibration = calibration
        self._keys = [[ExpertKey(layer, e) for e in range(trace.num_experts)] for layer in trace.layers]
        store = _StoreOfNothing(calibration, [key for of_layer in self._keys for key in of_layer])
        host = None
        if settings.host_slots:
            held = store.header.keys[: settings.host_slots] if settings.warm_host else ()
            host = SimulatedHost(settings.host_slots, held, exclusive=settings.exclusive_tiers)
        self._transfer = SimulatedTransfer(
            calibration, store.position, link_bandwidth=settings.link_bandwidth, host=host
        )
        self._cache = ExpertCache(
            store,
            _PoolOfNothing(settings.num_slots, calibration.record_nbytes),
            make_policy(settings.policy, settings.num_slots, trace, steps),
            clock=self._transfer.clock,
            transfer=self._transfer,
            arrival=Arrival(self._transfer, calibration.offload.arrival_s),
        )
        self._row_request = np.repeat(np.arange(trace.num_requests), np.diff(trace.seq_off))
        self._certain: CertainPrefetch | None = None
        self._foretelling: ForetellingPrefetch | None = None
        self._stream: LayerStream | None = None
        prefetcher = Prefetcher(self._cache, len(trace.layers), clock=self._transfer.clock)
        if settings.predictor in ("stream", "auto") and not self._cache.holds_all:
            self._stream = LayerStream(self._cache, self._keys)
        if settings.predictor == "oracle":
            self._certain = CertainPrefetch(prefetcher, self._keys, always=True)
        elif settings.predictor == "auto" and not self._cache.holds_all:
            self._foretelling = ForetellingPrefetch(
                prefetcher, self._keys, recall=settings.recall, precision=settings.precision, seed=seed
            )

    def step(self, step: Step) -> SimulatedStep:
        """As `Engine.step` does it."""
        transfer, cache, trace = self._transfer, self._cache, self._trace
        began, stalled, num_read = transfer.now, cache.stall_s, transfer.num_reads
        before = cache.stats()
        phase: Phase = "prefill" if step.is_prefill else "decode"
        cost = self._calibration.prefill if step.is_prefill else self._calibration.decode
        rows = np.asarray(step.rows)
        num_rows = len(rows)
        positions = rows - trace.seq_off[self._row_request[rows]]
        num_attended = int(positions.sum()) + num_rows
        chosen = trace.ids[rows].swapaxes(0, 1)  # [L, tokens, k]
        counts = [np.bincount(of_layer.ravel(), minlength=trace.num_experts) for of_layer in chosen]
        experts = [np.flatnonzero(of_layer).tolist() for of_layer in counts]
        transfer.compute(cost.begin.seconds(num_rows, num_attended))
        self._foretell(-1, experts, step, num_submitted=transfer.num_submitted)
        layer_stall_s = []
        for index in range(len(experts)):
            between = cost.layer if index else cost.first
            transfer.compute(between.seconds(num_rows, num_attended))
            stalled_before = cache.stall_s
            self._layer(index, step, chosen[index], counts[index], experts, phase, cost)
            layer_stall_s.append(cache.stall_s - stalled_before)
        if self._certain is not None:
            self._certain.step_ends()
        if self._foretelling is not None:
            self._foretelling.step_ends(0 if step.is_prefill else num_rows)
        transfer.compute(cost.end.seconds(num_rows, num_attended))
        for request in step.ended:
            cache.ended(request)
        after = cache.stats()
        counted, before_counted = getattr(after, phase), getattr(before, phase)
        prompt_ends = trace.num_prompt[self._row_request[rows]]
        return SimulatedStep(
            is_prefill=step.is_prefill,
            num_rows=num_rows,
            num_output_rows=int((positions >= prompt_ends).sum()),
            seconds=transfer.now - began,
            stall_s=cache.stall_s - stalled,
            num_reads=transfer.num_reads - num_read,
            queries=counted.queries - before_counted.queries,
            hits=counted.hits - before_counted.hits,
            layer_stall_s=tuple(layer_stall_s),
        )

    def _layer(
        self,
        index: int,
        step: Step,
        chosen: np.typing.NDArray[np.unsignedinteger],
        counts: np.typing.NDArray[np.intp],
        experts: Sequence[Sequence[int]],
        phase: Phase,
        cost: PhaseCost,
    ) -> None:
        """As `engine.layers.moe.MoELayer` does it."""
        transfer, cache, offload = self._transfer, self._cache, self._calibration.offload
        keys = [self._keys[index][expert] for expert in experts[index]]
        if not cache.holds_all:
            transfer.compute(offload.call_s + offload.row_s * len(step.rows))
            cache.observe(keys[0].layer, step.requests, chosen.tolist(), is_prefill=step.is_prefill)
        slowdown = 1.0 if cache.holds_all else offload.experts_slowdown
        num_submitted = transfer.num_submitted
        with cache.acquire(keys, phase) as lease:
            transfer.compute(offload.miss_s * (transfer.num_submitted - num_submitted))
            self._foretell(index, experts, step, num_submitted=transfer.num_submitted)
            num_found = 0
            for found in lease.batches():
                num_found = len(found)
                num_products = int(sum(counts[key.expert] for key, _ in found))
                transfer.compute(slowdown * cost.experts.seconds(num_found, num_products))
        if num_found < len(keys):
            transfer.compute(cost.combine_product_s * chosen.size)

    def _foretell(self, index: int, experts: Sequence[Sequence[int]], step: Step, *, num_submitted: int) -> None:
        """What the observers do once that layer is routed; -1: before the first."""
        offload = self._calibration.offload
        if self._certain is not None:
            self._certain.step_begins(experts) if index < 0 else self._certain.layer_begins(index)
        elif self._foretelling is not None:
            if index < 0:
                self._foretelling.step_begins(experts)
            else:
                self._foretelling.layer_begins(index)
            if self._foretelling.is_on:
                self._transfer.compute(offload.foretell_s)
        if self._stream is not None:
            if index < 0:
                self._stream.step_begins(len(step.rows))
            else:
                self._stream.layer_begins(index, experts[index])
        self._transfer.compute(offload.prefetch_s * (self._transfer.num_submitted - num_submitted))


class _StoreOfNothing(ExpertStore):
    """Knows where records would lie."""

    def __init__(self, calibration: Calibration, keys: Sequence[ExpertKey]) -> None:
        self.header = PackedHeader(
            calibration.experts_format, 0, 0, "", calibration.record_nbytes, 0, tuple(keys), ("",) * len(keys)
        )
        self._index = {key: i for i, key in enumerate(keys)}


class _PoolOfNothing(SlotPool):
    """Slots without memory."""

    def __init__(self, num_slots: int, slot_nbytes: int) -> None:
        self.num_slots = num_slots
        self.slot_nbytes = slot_nbytes
        self._free = list(range(num_slots - 1, -1, -1))

    def buffer(self, slot: int) -> memoryview:
        return memoryview(b"")
