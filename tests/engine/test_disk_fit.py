from __future__ import annotations

import pytest

from cache.replay import schedule
from engine.calibration import OffloadCost
from engine.disk_fit import fit_disk, slower
from engine.simulate import SimulationSettings, simulated_steps
from tests.cache.synthetic_traces import local_trace
from tests.engine.test_simulate import calibration_of

SETTINGS = SimulationSettings(num_slots=12, policy="lru", concurrency=2)


@pytest.mark.parametrize("factor", [0.5, 1.6, 3.0])
def test_a_disk_is_found_as_slow_as_layers_waited_for_it(factor: float):
    trace = local_trace(0, [30, 30])
    probed = calibration_of(trace, offload=OffloadCost(read_slowdown=1.5))
    steps = list(schedule(trace, 2))
    served = simulated_steps(trace, slower(probed, factor), SETTINGS, steps=lambda: steps)
    waited_s = {i: list(step.layer_stall_s) for i, step in enumerate(served) if i >= 4}
    waited_s[9] = [3.0 * stall_s for stall_s in waited_s[9]]  # something else wanted the disk
    found = fit_disk(probed, SETTINGS, trace, steps, waited_s)
    assert found.disk.latency_s == pytest.approx(factor * probed.disk.latency_s, rel=0.03)
    assert found.disk.rate(1) == pytest.approx(probed.disk.rate(1) / factor, rel=0.03)
    assert found.offload == probed.offload


def test_where_nothing_waited_the_disk_stays_as_it_was_probed():
    trace = local_trace(0, [6])
    probed = calibration_of(trace)
    steps = list(schedule(trace, 1))
    assert fit_disk(probed, SETTINGS, trace, steps, {5: [0.0] * len(trace.layers)}) == probed
