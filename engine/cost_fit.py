"""From the times of steps to the costs of a `Calibration`. Robust: some of the times were disturbed."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Sequence
from itertools import pairwise

import numpy as np

from engine.calibration import ExpertCost, OffloadCost, PhaseCost, StepCost
from engine.step_clock import ExpertCall, LayerTimes, StepTimes

_NUM_REWEIGHTINGS = 20
_LEAST_ERROR = 1e-3  # relative; a smaller one weighs no more


def fit_costs(
    features: Sequence[Sequence[float]], seconds: Sequence[float], known: Sequence[float] | None = None
) -> list[float]:
    """Coefficients >= 0 of features [n, d], with `known` [n] beside them, whose summed relative errors are the least.

    Not squared, so that a measurement that something else disturbed counts little: non-negative least squares, with
    weights that follow the errors.
    """
    from scipy.optimize import nnls

    times = np.maximum(np.asarray(seconds, dtype=np.float64), 1e-9)
    wanted = 1.0 - (np.zeros(len(times)) if known is None else np.asarray(known) / times)
    relative = np.asarray(features, dtype=np.float64) / times[:, None]
    scale = np.maximum(np.abs(relative).max(axis=0), 1e-30)
    relative = relative / scale
    weights = np.ones(len(times))
    solution = np.zeros(relative.shape[1])
    for _ in range(_NUM_REWEIGHTINGS):
        root = np.sqrt(weights)
        solution, _ = nnls(relative * root[:, None], wanted * root)
        weights = 1.0 / np.maximum(np.abs(relative @ solution - wanted), _LEAST_ERROR)
    return [float(value) for value in solution / scale]


def fit_phase(steps: Sequence[StepTimes]) -> PhaseCost:
    """Of steps with all experts in memory; those that still read are left out where enough others are there."""
    quiet = [step for step in steps if not any(layer.num_in_flight for layer in step.layers)]
    steps = quiet if len(quiet) >= 3 else steps
    rows = [(1.0, float(step.num_rows)) for step in steps]
    begin = fit_costs(rows, [step.told - step.began for step in steps])
    calls = [(_shape(layer, call), call.ended - call.began) for step in steps for layer, call in _calls(step)]
    experts = fit_costs([(1.0, *shape) for shape, _ in calls], [seconds for _, seconds in calls])
    return PhaseCost(
        begin=StepCost(fixed_s=begin[0], row_s=begin[1]),
        first=_fit_steps(steps, [[step.layers[0].calls[0].began - step.told] for step in steps]),
        layer=_fit_steps(steps, [list(_between(step)) for step in steps]),
        end=_fit_steps(steps, [[step.ended - step.layers[-1].ended] for step in steps]),
        experts=ExpertCost(call_s=experts[0], expert_s=experts[1], product_s=experts[2]),
        combine_product_s=0.0,
    )


def fit_bookkeeping(steps: Sequence[StepTimes], cost: PhaseCost) -> OffloadCost:
    """What is between two layers' kernels beyond what `cost` says, of decode steps that read experts on demand."""
    features, seconds, known = [], [], []
    for step in steps:
        if not step.is_prefill:
            for (_, after), between_s in zip(pairwise(step.layers), _between(step), strict=True):
                if not after.is_immediate:
                    continue
                features.append((1.0, float(step.num_rows), float(after.num_in_flight)))
                seconds.append(between_s)
                known.append(cost.layer.seconds(step.num_rows, step.num_attended))
    call_s, row_s, miss_s = fit_costs(features, seconds, known)
    return OffloadCost(call_s=call_s, row_s=row_s, miss_s=miss_s, prefetch_s=miss_s)


def fit_foretelling(steps: Sequence[StepTimes], cost: PhaseCost, offload: OffloadCost) -> float:
    """The same of the first decode steps with predictors, which foretell: their seconds in a layer call."""
    extra = []
    for step in [step for step in steps if not step.is_prefill][:_NUM_FORETOLD]:
        known = cost.layer.seconds(step.num_rows, step.num_attended) + offload.call_s + offload.row_s * step.num_rows
        for before, after in pairwise(step.layers):
            extra.append(after.routed - before.ended - known - offload.miss_s * after.num_in_flight)
    return max(0.0, statistics.median(extra)) if extra else 0.0


def fit_kernels(steps: Sequence[StepTimes], cost: PhaseCost) -> tuple[float, float]:
    """How many times longer the expert kernel takes than with all in memory, and again while records are read."""
    ratios: dict[bool, list[float]] = {False: [], True: []}
    for step in steps:
        if not step.is_prefill:
            for layer, call in _calls(step):
                num_experts, num_products = _shape(layer, call)
                predicted = cost.experts.seconds(int(num_experts), int(num_products))
                ratios[call.is_reading].append((call.ended - call.began) / max(predicted, 1e-9))
    if not (ratios[True] and ratios[False]):
        return 1.0, 1.0
    alone = statistics.median(ratios[False])
    return alone, max(1.0, statistics.median(ratios[True]) / alone)


def fit_combine(steps: Sequence[StepTimes]) -> float:
    """Seconds of a product in the sum that follows experts computed one after the other."""
    times = [layer.combine_s / layer.ids.size for step in steps for layer in step.layers if layer.combine_s is not None]
    return statistics.median(times) if times else 0.0


_NUM_FORETOLD = 8  # decode steps with foretelling until the prefetcher tries without


def _fit_steps(steps: Sequence[StepTimes], seconds: Sequence[Sequence[float]]) -> StepCost:
    """`seconds`: of each step, one or several alike."""
    features = [
        (1.0, float(step.num_rows), float(step.num_attended))
        for step, of_step in zip(steps, seconds, strict=True)
        for _ in of_step
    ]
    times = [one for of_step in seconds for one in of_step]
    fitted = fit_costs(features, times) if times else [0.0, 0.0, 0.0]
    return StepCost(fixed_s=fitted[0], row_s=fitted[1], attended_s=fitted[2])


def _between(step: StepTimes) -> Iterator[float]:
    """From a layer's last kernel to the next layer's first."""
    for before, after in pairwise(step.layers):
        yield after.calls[0].began - before.ended


def _calls(step: StepTimes) -> Iterator[tuple[LayerTimes, ExpertCall]]:
    for layer in step.layers:
        for call in layer.calls:
            yield layer, call


def _shape(layer: LayerTimes, call: ExpertCall) -> tuple[float, float]:
    """-> experts, products."""
    counts = np.bincount(layer.ids.ravel())
    return float(len(call.experts)), float(counts[call.experts].sum())
