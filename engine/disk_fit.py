"""How fast records really come while an engine computes: the one cost that is fitted through the simulation."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import msgspec
import numpy as np

from cache.replay import Step
from cache.trace import RoutingTrace
from engine.calibration import Calibration, LinkCost
from engine.simulate import SimulationSettings, simulated_steps

_MOST = 4.0  # times slower or faster
_PRECISION = 0.01


def fit_disk(
    calibration: Calibration,
    settings: SimulationSettings,
    trace: RoutingTrace,
    steps: Sequence[Step],
    waited_s: Mapping[int, Sequence[float]],
) -> Calibration:
    """The disk so much slower or faster that the layers of simulated steps wait as nearly as long as they did.

    waited_s: of steps by their place, what each layer with experts waited. One factor and no more: what a miss costs
    beside its bytes cannot be told from the bytes in one run, and fitted together they are told apart by chance.
    """
    from scipy.optimize import minimize_scalar

    measured = np.asarray(list(waited_s.values()))
    if not measured.any():
        return calibration

    def error(log_factor: float) -> float:
        simulated = simulated_steps(trace, slower(calibration, math.exp(log_factor)), settings, steps=lambda: steps)
        stalled = np.asarray([simulated[i].layer_stall_s for i in waited_s])
        return float(np.abs(stalled - measured).sum())

    most = math.log(_MOST)
    found = minimize_scalar(error, bounds=(-most, most), method="bounded", options={"xatol": _PRECISION})
    return slower(calibration, math.exp(float(found.x)))


def slower(calibration: Calibration, factor: float) -> Calibration:
    """The same with a disk that takes so many times as long."""
    disk = calibration.disk
    rates = {num_reads: rate / factor for num_reads, rate in disk.rates.items()}
    return msgspec.structs.replace(calibration, disk=LinkCost(latency_s=disk.latency_s * factor, rates=rates))
