"""Seconds that one token of one sequence takes, by what it waits for: from a calibration, else from bandwidths."""

from __future__ import annotations

import logging
from pathlib import Path

from engine.calibration import Calibration, load_calibration
from engine.checkpoint import Checkpoint
from engine.config import EngineConfig
from engine.errors import ConfigError
from engine.footprint import streamed_nbytes
from engine.machine import Machine

_log = logging.getLogger(__name__)

_OF_MEMORY = 0.85  # of the streaming read, what a step of one sequence reaches
_LAYER_S, _STEP_S = 150e-6, 1.5e-3  # of a step outside of reading weights
_CALL_S, _MISS_S = 60e-6, 60e-6  # of bookkeeping where experts are missed: a layer call, a miss
_UNKNOWN_BANDWIDTH = 8e9  # of memory that could not be measured; half a desktop's
_CONTEXT = 256  # positions that a token attends to
_MEMORY, _DISK, _BOOKS = "memory bandwidth", "the disk that experts come from", "bookkeeping"


def calibrated_costs(
    config: EngineConfig, dtype: str, format: str, packed: Path, num_experts: int
) -> Calibration | None:
    """What `foregate calibrate` has left beside the packed experts, if it is of this."""
    path = packed.with_name(f"calibration.{format}.json")
    if not path.exists():
        return None
    try:
        costs = load_calibration(path)
    except ConfigError as error:
        _log.warning("%s", error)
        return None
    is_of_this = costs.dtype == dtype and costs.num_layers * costs.num_experts == num_experts
    return costs if is_of_this and config.kernels == "auto" and config.num_threads is None else None


def calibrated_s(costs: Calibration, config: EngineConfig, per_token: int, num_missed: float) -> dict[str, float]:
    """Seconds of a token of one sequence, by what it waits for."""
    phase, offload, layers = costs.decode, costs.offload, costs.num_layers
    dense_s = sum(part.seconds(1, _CONTEXT) for part in (phase.begin, phase.first, phase.end))
    dense_s += (layers - 1) * phase.layer.seconds(1, _CONTEXT)
    active = per_token // layers
    experts_s = layers * phase.experts.seconds(active, active)
    if not num_missed:
        return {_MEMORY: dense_s + experts_s}
    experts_s *= offload.experts_slowdown
    read_s = num_missed * (costs.disk.latency_s + costs.record_nbytes / _link(config, costs.disk.rate(1)))
    hidden_s = experts_s * (1.0 - num_missed / per_token)  # of experts that are there, while others are read
    return {
        _MEMORY: dense_s + experts_s,
        _DISK: max(0.0, read_s - hidden_s),
        _BOOKS: layers * (offload.call_s + offload.row_s) + num_missed * (offload.miss_s + offload.arrival_s),
    }


def expected_s(
    machine: Machine,
    config: EngineConfig,
    checkpoint: Checkpoint,
    dtype: str,
    per_token: int,
    num_missed: float,
    record: int,
) -> dict[str, float]:
    """The same from bandwidths, where nothing was calibrated."""
    read_bandwidth = (machine.memory_bandwidth or _UNKNOWN_BANDWIDTH) * _OF_MEMORY
    compute_s = (streamed_nbytes(checkpoint, dtype) + per_token * record) / read_bandwidth
    compute_s += checkpoint.spec.num_layers * _LAYER_S + _STEP_S
    if not num_missed:
        return {_MEMORY: compute_s}
    moe = checkpoint.spec.moe
    wait_s = num_missed * record / _link(config, machine.disk_bandwidth) if machine.disk_bandwidth else 0.0
    calls_s = (len(moe.layers) if moe else 0) * _CALL_S
    return {_MEMORY: compute_s, _DISK: wait_s, _BOOKS: calls_s + num_missed * _MISS_S}


def _link(config: EngineConfig, disk_bandwidth: float) -> float:
    return disk_bandwidth if config.cache.link_bandwidth is None else min(disk_bandwidth, config.cache.link_bandwidth)
