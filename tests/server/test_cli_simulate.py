"""server/cli_simulate.py: `foregate simulate`."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

from engine.errors import ConfigError
from server.cli_simulate import simulate
from tests.cache.synthetic_traces import local_trace
from tests.engine.test_simulate import calibration_of

app = typer.Typer()
app.command()(simulate)


@pytest.fixture
def files(tmp_path: Path) -> tuple[str, ...]:
    trace = local_trace(0, [20] * 3, num_prompt=4)
    trace.save(tmp_path / "local.npz")
    calibration_of(trace).save(tmp_path / "costs.json")
    return str(tmp_path / "local.npz"), "--calibration", str(tmp_path / "costs.json")


def run(*args: str) -> str:
    result = CliRunner().invoke(app, args, catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.output


def test_several_values_give_a_row_each(files: tuple[str, ...]):
    lines = run(*files, "--cache", "25%,48", "--policy", "lru,belady", "--concurrency", "1,2").splitlines()
    assert lines[0].startswith("tiny, int8 experts of 0.00 MB, on paper (measured costs): 3 requests, 60 tokens")
    assert [(line.split()[0], line.split()[1], line.split()[3]) for line in lines[2:]] == [
        (size, policy, at_once) for size in ("25%", "48") for policy in ("lru", "belady") for at_once in "12"
    ]


def test_json_has_an_object_a_line_with_both_phases(files: tuple[str, ...]):
    rows = [json.loads(line) for line in run(*files, "--predictor", "off,oracle", "--policy", "lru", "--json").split()]
    assert [row["settings"]["predictor"] for row in rows] == ["off", "oracle"]
    for row in rows:
        assert row["decode"]["num_tokens"] + row["prefill"]["num_tokens"] == 60
        assert row["output_tokens_per_s"] > 0
        assert row["is_measured"]


def test_a_link_and_a_tier_between_change_the_speed(files: tuple[str, ...]):
    def speed(*args: str) -> float:
        return float(json.loads(run(*files, "--policy", "lru", "--json", *args))["output_tokens_per_s"])

    assert speed("--link", "1KiB/s") < speed() < speed("--host-memory", "1MiB")


def test_a_machine_of_the_table_is_labelled_as_simulated(tmp_path: Path):
    local_trace(0, [4], num_layers=16, num_experts=64, active=8).save(tmp_path / "t.npz")
    args = (str(tmp_path / "t.npz"), "--machine", "l40s", "--model-shape", "olmoe", "--policy", "lru")
    assert "on l40s (SIMULATED HARDWARE, costs from published figures)" in run(*args)
    assert not json.loads(run(*args, "--json"))["is_measured"]


def test_another_models_trace_is_reshaped_if_asked_and_the_title_says_so(tmp_path: Path):
    local_trace(0, [4], num_layers=4, num_experts=32, active=4).save(tmp_path / "t.npz")
    args = (str(tmp_path / "t.npz"), "--machine", "l40s", "--model-shape", "olmoe", "--policy", "lru")
    with pytest.raises(ConfigError, match="the trace has"):
        run(*args)
    assert "RESHAPED from another model's routing" in run(*args, "--reshape")


@pytest.mark.parametrize(
    ("args", "why"),
    [
        (("--cache", "many"), "cannot read cache size"),
        (("--concurrency", "0"), "not a number of requests"),
        (("--predictor", "crystal"), "known: off, stream, oracle, auto"),
        (("--policy", "best"), "known: belady"),
    ],
)
def test_what_cannot_be_simulated_is_named(files: tuple[str, ...], args: tuple[str, ...], why: str):
    with pytest.raises(ConfigError, match=why):
        run(*files, *args)


def test_more_experts_than_a_machine_has_room_for_are_refused(tmp_path: Path):
    local_trace(0, [2], num_layers=32, num_experts=8).save(tmp_path / "t.npz")
    with pytest.raises(ConfigError, match=r"256 experts are .* GiB, rtx4090 has"):
        run(str(tmp_path / "t.npz"), "--machine", "rtx4090", "--model-shape", "mixtral", "--cache", "100%")


def test_costs_come_from_one_place(files: tuple[str, ...]):
    result = CliRunner().invoke(app, [*files, "--machine", "l40s"])
    assert result.exit_code == 2
    assert CliRunner().invoke(app, [files[0], "--machine", "l40s"]).exit_code == 2


def test_what_fits_is_as_much_as_the_machine_has_room_for(files: tuple[str, ...], tmp_path: Path):
    local_trace(0, [4], num_layers=32, num_experts=8, active=2).save(tmp_path / "t.npz")
    args = (str(tmp_path / "t.npz"), "--machine", "rtx4090", "--model-shape", "mixtral", "--policy", "lru", "--json")
    settings = json.loads(run(*args, "--experts", "bf16", "--cache", "fits"))["settings"]
    assert 0 < settings["num_slots"] < 256
    with pytest.raises(ConfigError, match=f"{settings['num_slots']} at most"):
        run(*args, "--experts", "bf16", "--cache", str(settings["num_slots"] + 1))
    with pytest.raises(ConfigError, match="known of machines of the table only"):
        run(*files, "--cache", "fits")
