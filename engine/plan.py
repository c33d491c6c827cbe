"""Before anything is loaded: does a model fit, how to serve it, what to expect and what it will wait for."""

from __future__ import annotations

import logging
import shlex
from dataclasses import replace
from pathlib import Path

import msgspec
import numpy as np

from cache.replay import replay
from cache.trace import RoutingTrace
from engine.checkpoint import Checkpoint
from engine.config import EngineConfig, format_nbytes
from engine.convert import Progress, expert_layout, packed_path
from engine.device_experts import open_named
from engine.engine import Engine
from engine.errors import ConfigError
from engine.footprint import dense_nbytes, kv_token_nbytes, room_for_experts
from engine.hit_rate import expected_hit_rate
from engine.machine import Machine, measure_machine
from engine.synthetic import SyntheticCheckpoint
from engine.token_costs import calibrated_costs, calibrated_s, expected_s
from engine.tokenizer import TokenDecoder

_log = logging.getLogger(__name__)

_FORMATS = ("bf16", "int8", "int4")  # of experts, the most exact first
_MAX_TRACE_TOKENS = 2000


class ServingPlan(msgspec.Struct, frozen=True, kw_only=True):
    """Bytes, bytes/s and shares of one. Speeds are expectations, of one sequence."""

    model: str
    fits: bool
    why: str  # not, or what it costs
    experts: str  # format
    dtype: str
    dense_nbytes: int
    kv_nbytes: int
    kv_tokens: int
    experts_nbytes: int  # all of them
    expert_memory_nbytes: int  # of these in memory
    num_slots: int
    num_experts: int
    packed_nbytes: int  # that must be written first; 0 if it is there
    hit_rate: float
    hit_rate_of: str  # what it was taken from
    tokens_per_s: float
    bottleneck: str
    is_calibrated: bool  # the speed is of costs that `foregate calibrate` measured, not of bandwidths
    memory_bandwidth: float | None
    disk_bandwidth: float | None
    command: str

    def lines(self) -> list[str]:
        """For people."""
        if not self.fits:
            return [f"{self.model} does not fit: {self.why}"]
        share = self.num_slots / max(1, self.num_experts)
        where = "all experts in memory" if share >= 1 else f"{share:.0%} of the experts in memory, {self.hit_rate_of}"
        memory = f"{format_nbytes(int(self.memory_bandwidth))}/s" if self.memory_bandwidth else "not measured"
        disk = f"{format_nbytes(int(self.disk_bandwidth))}/s" if self.disk_bandwidth else "not measured"
        experts = f"{format_nbytes(self.expert_memory_nbytes)} of {format_nbytes(self.experts_nbytes)}"
        return [
            f"experts {self.experts}: {experts} ({where}); other weights {self.dtype}: "
            f"{format_nbytes(self.dense_nbytes)}; keys and values: {format_nbytes(self.kv_nbytes)} for "
            f"{self.kv_tokens} tokens",
            f"expected: {self.tokens_per_s:.1f} tokens/s for one sequence, hit rate {self.hit_rate:.0%}; what it waits "
            f"for: {self.bottleneck} (memory {memory}, disk {disk}{', calibrated' if self.is_calibrated else ''})"
            f"{'; ' + self.why if self.why else ''}",
        ]


def open_checkpoint(directory: Path, random_shape: str | None = None, num_layers: int | None = None) -> Checkpoint:
    """The directory's, or random weights of a known shape."""
    if random_shape is None:
        return Checkpoint(directory)
    return SyntheticCheckpoint(random_shape, num_layers, directory)


def plan_serving(config: EngineConfig, checkpoint: Checkpoint, trace: RoutingTrace | None = None) -> ServingPlan:
    """What the configuration leaves open is chosen; what it sets is kept. Measures the machine for a second or two.

    `trace`: recorded routing of the model, for its own hit rate instead of that of published models. Raises
    `ConfigError` for a trace of another model and for formats that cannot be.
    """
    return plan_on(_measured(config, checkpoint), config, checkpoint, trace)


def _measured(config: EngineConfig, checkpoint: Checkpoint) -> Machine:
    near = packed_path(checkpoint, "int8", config.cache.packed_dir).parent
    files = [*near.glob("experts.*.safetensors"), *checkpoint.directory.glob("*.safetensors")]
    return measure_machine(near, files, config.num_threads)


def plan_on(
    machine: Machine, config: EngineConfig, checkpoint: Checkpoint, trace: RoutingTrace | None = None
) -> ServingPlan:
    """As `plan_serving`, on a machine that is known."""
    moe = checkpoint.spec.moe
    dtype = config.resolved(moe is not None).dtype
    dense, kv_token = dense_nbytes(checkpoint, dtype), kv_token_nbytes(checkpoint, dtype)
    room = room_for_experts(machine.free_nbytes, config.kv_memory_nbytes, dense)
    num_experts = per_token = 0
    if moe is not None:
        num_experts, per_token = len(moe.layers) * moe.num_experts, len(moe.layers) * moe.num_active
    given = config.cache.memory_nbytes
    budget = max(0, room) if given is None else given
    format = _format(config, checkpoint, budget, num_experts)
    record = 0 if moe is None else expert_layout(checkpoint, format).nbytes
    num_slots = 0 if moe is None else min(budget // record, num_experts)
    packed = packed_path(checkpoint, format, config.cache.packed_dir)
    to_write = 0 if moe is None or packed.exists() else num_experts * record
    why = _refusal(machine, config, dense, given, num_slots, record, to_write, moe is not None)
    hit_rate, hit_rate_of = _hit_rate(num_slots, num_experts, per_token, trace, config)
    num_missed = per_token * (1.0 - hit_rate)
    costs = calibrated_costs(config, dtype, format, packed, num_experts)
    if costs is not None and moe is not None:
        parts = calibrated_s(costs, config, per_token, num_missed)
    else:
        parts = expected_s(machine, config, checkpoint, dtype, per_token, num_missed, record)
    return ServingPlan(
        model=config.served_name or checkpoint.directory.resolve().name,
        fits=not why,
        why=why or _remark(num_slots, num_experts, per_token, record, to_write),
        experts=format if moe is not None else "",
        dtype=dtype,
        dense_nbytes=dense,
        kv_nbytes=config.kv_memory_nbytes,
        kv_tokens=int(config.kv_memory_nbytes / kv_token),
        experts_nbytes=num_experts * record,
        expert_memory_nbytes=num_slots * record,
        num_slots=num_slots,
        num_experts=num_experts,
        packed_nbytes=to_write,
        hit_rate=hit_rate,
        hit_rate_of=hit_rate_of,
        tokens_per_s=1.0 / sum(parts.values()),
        bottleneck=max(parts, key=lambda name: parts[name]),
        is_calibrated=costs is not None,
        memory_bandwidth=machine.memory_bandwidth,
        disk_bandwidth=machine.disk_bandwidth,
        command=_command(config, format, num_slots * record, num_slots < num_experts),
    )


def with_plan(config: EngineConfig, plan: ServingPlan) -> EngineConfig:
    """The configuration with the plan's format where it leaves that open."""
    if config.cache.format != "auto" or not plan.experts:
        return config
    return replace(config, cache=replace(config.cache, format=plan.experts))


def planned_engine(
    config: EngineConfig, progress: Progress | None = None, *, tokenizer: TokenDecoder | None = None
) -> Engine:
    """An engine as planned, and what to expect of it in the log."""
    checkpoint = Checkpoint(config.model)
    device = open_named(config.device)
    if device is not None and device.tensors_on != "cpu":  # what a CPU would make of it says nothing of a GPU's speed
        plan = plan_on(replace(_measured(config, checkpoint), free_nbytes=device.memory()[0]), config, checkpoint)
        _log.info("%s", plan.lines()[0])
    else:
        plan = plan_serving(config, checkpoint)
        for line in plan.lines():
            _log.log(logging.INFO if plan.fits else logging.WARNING, "%s", line)
    return Engine(with_plan(config, plan), progress, tokenizer=tokenizer, device=device)


def _format(config: EngineConfig, checkpoint: Checkpoint, budget: int, num_experts: int) -> str:
    """The one that is set; else the most exact one of which all experts fit, at worst the smallest.

    A budget that somebody has set says that not all are to fit: then what the checkpoint has is kept.
    """
    if config.cache.format != "auto" or checkpoint.spec.moe is None:
        return _FORMATS[0] if config.cache.format == "auto" else config.cache.format
    if config.cache.memory_nbytes is not None:
        return _FORMATS[0]
    sizes = {format: nbytes for format in _FORMATS if (nbytes := _record_nbytes(checkpoint, format)) is not None}
    return next(
        (format for format, nbytes in sizes.items() if num_experts * nbytes <= budget),
        min(sizes, key=lambda format: sizes[format]),
    )


def _record_nbytes(checkpoint: Checkpoint, format: str) -> int | None:
    """None for a format that cannot hold experts of that shape."""
    try:
        return expert_layout(checkpoint, format).nbytes
    except ConfigError:
        return None


def _refusal(
    machine: Machine,
    config: EngineConfig,
    dense: int,
    given: int | None,
    num_slots: int,
    record: int,
    to_write: int,
    has_experts: bool,
) -> str:
    needed = dense + config.kv_memory_nbytes + (given or 0)
    if needed > machine.free_nbytes:
        return (
            f"{format_nbytes(needed)} are needed beside {'other ' if given is None else ''}experts, "
            f"{format_nbytes(machine.free_nbytes)} are free; lower --kv-memory or choose --dtype int8"
        )
    if has_experts and num_slots < 1:
        return f"not one expert ({format_nbytes(record)}) has room; choose --experts int4 or free some memory"
    if to_write > machine.disk_free_nbytes:
        return (
            f"packed experts take {format_nbytes(to_write)} on disk, {format_nbytes(machine.disk_free_nbytes)} are "
            "free; choose another --packed-dir"
        )
    return ""


def _remark(num_slots: int, num_experts: int, per_token: int, record: int, to_write: int) -> str:
    remarks = []
    if num_slots < min(per_token, num_experts):
        remarks.append(
            f"below one token's {per_token} experts ({format_nbytes(per_token * record)}) most are read for every token"
        )
    if to_write:
        remarks.append(f"{format_nbytes(to_write)} of packed experts are written first")
    return "; ".join(remarks)


def _hit_rate(
    num_slots: int, num_experts: int, per_token: int, trace: RoutingTrace | None, config: EngineConfig
) -> tuple[float, str]:
    if num_slots >= num_experts:
        return 1.0, ""
    if num_slots == 0:
        return 0.0, ""
    if trace is not None:
        if trace.num_keys != num_experts:
            raise ConfigError(f"the trace is of a model with {trace.num_keys} experts, this one has {num_experts}")
        last = int(np.searchsorted(trace.seq_off, _MAX_TRACE_TOKENS))
        part = trace.select(0, max(1, min(last, trace.num_requests)))
        return replay(part, config.cache.policy, num_slots).hit_rate, "hit rate of the trace"
    return expected_hit_rate(num_slots, num_experts, per_token), "hit rate as of published models"


def _command(config: EngineConfig, format: str, expert_memory: int, is_short: bool) -> str:
    parts = ["foregate", "serve", str(config.served_name or config.model), "--experts", format]
    if config.dtype != "auto":
        parts += ["--dtype", config.dtype]
    parts += ["--kv-memory", f"{config.kv_memory_nbytes // 1024**2}MiB"]
    if is_short:
        parts += ["--expert-memory", f"{expert_memory // 1024**2}MiB"]
    if config.cache.packed_dir is not None:
        parts += ["--packed-dir", str(Path(config.cache.packed_dir))]
    return shlex.join(parts)
