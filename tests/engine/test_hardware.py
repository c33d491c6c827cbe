"""The hardware table: every figure says whence, and every machine can be simulated."""

from __future__ import annotations

import pytest

from engine.errors import ConfigError
from engine.hardware import Channel, Figure, Machine, calibration_of, hardware
from engine.simulate import SimulationSettings, simulate
from tests.cache.synthetic_traces import local_trace

TABLE = hardware()


def figures_of(entry: Machine | Channel | Figure) -> list[Figure]:
    if isinstance(entry, Figure):
        return [entry]
    values = [getattr(entry, name) for name in entry.__struct_fields__]
    return [value for value in values if isinstance(value, Figure)]


@pytest.mark.parametrize("table", ["machines", "links", "hosts", "disks", "shares", "times"])
def test_every_figure_has_a_source_and_an_assumed_one_says_so(table: str):
    for name, entry in getattr(TABLE, table).items():
        assert figures_of(entry), name
        for figure in figures_of(entry):
            assert figure.value > 0
            assert len(figure.source) > 10, name
            assert (figure.kind == "assumed") == figure.source.startswith("assumed: "), name


def test_what_is_around_a_machine_is_in_the_other_tables():
    for machine in TABLE.machines.values():
        assert machine.link in TABLE.links
        assert machine.host in TABLE.hosts
        assert machine.disk in TABLE.disks
    assert all(shape.source.startswith("config.json of ") for shape in TABLE.models.values())
    assert all(0 < share.value <= 1 for share in TABLE.shares.values())


@pytest.mark.parametrize("machine", TABLE.machines)
@pytest.mark.parametrize("model", TABLE.models)
def test_every_model_on_every_machine_has_costs_that_say_they_were_not_measured(machine: str, model: str):
    costs = calibration_of(machine, model)
    assert not costs.is_measured
    assert costs.machine == machine
    assert costs.record_nbytes % 4096 == 0
    assert costs.decode.layer.seconds(1, 100) > 0
    assert costs.decode.experts.seconds(1, 1) > 0


def test_a_faster_machine_is_faster_and_says_that_it_is_simulated():
    shape = TABLE.models["granite-3.0-1b-a400m"]
    trace = local_trace(
        0, [12], num_layers=shape.num_moe_layers, num_experts=shape.num_experts, active=shape.num_active
    )
    settings = SimulationSettings(num_slots=300, policy="lru", host_slots=trace.num_keys, warm_host=True)
    results = [simulate(trace, calibration_of(name, "granite-3.0-1b-a400m"), settings) for name in ("l40s", "h100-80g")]
    assert results[1].output_tokens_per_s > results[0].output_tokens_per_s > 0
    assert not any(result.is_measured for result in results)


def test_unknown_names_are_answered_with_the_known_ones():
    with pytest.raises(ConfigError, match="unknown machine 'tpu'; known: rtx4090, l40s"):
        calibration_of("tpu", "olmoe")
    with pytest.raises(ConfigError, match="unknown model shape 'gpt-9'; known: olmoe"):
        calibration_of("l40s", "gpt-9")
    with pytest.raises(ConfigError, match="unknown expert format 'int3'; known: float32, bf16, int8, int4"):
        calibration_of("l40s", "olmoe", "int3")
