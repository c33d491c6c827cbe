"""server/cli_trace.py: `foregate trace replay`."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from engine.errors import ConfigError
from server.cli_trace import app
from tests.cache.synthetic_traces import local_trace


@pytest.fixture
def file(tmp_path: Path) -> str:
    path = tmp_path / "local.npz"
    local_trace(0, [20] * 4).save(path)
    return str(path)


def run(*args: str) -> str:
    result = CliRunner().invoke(app, ["replay", *args], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.output


def test_a_table_of_policies_and_sizes(file: str):
    lines = run(file, "--cache", "12.5%,24", "--policy", "segment,lru,belady", "--half", "second").splitlines()
    assert lines[0] == "local.npz: 2 requests, 40 tokens, 6 layers, 2 of 16 experts a token"
    assert [line.split()[:3] for line in lines[2:]] == [
        [name, size, slots] for size, slots in (("12.5%", "12"), ("24", "24")) for name in ("segment", "lru", "belady")
    ]
    assert [line.split()[4] for line in lines[3:5]] == ["0.0%", "100.0%"]


def test_json_has_an_object_a_line(file: str):
    rows = [json.loads(line) for line in run(file, "--policy", "lfu", "--cache", "25%", "--json").splitlines()]
    assert [(row["policy"], row["num_slots"]) for row in rows] == [("lfu", 24)]
    assert rows[0]["num_queries"] == 80 * 6 * 2
    assert rows[0]["prefill_hit_rate"] is None


def test_every_so_many_requests_are_taken(file: str):
    assert run(file, "--every", "3", "--policy", "lru").startswith("local.npz: 2 requests, 40 tokens")
    assert run(file, "--requests", "1:4", "--every", "2", "--policy", "lru").startswith("local.npz: 2 requests")


@pytest.mark.parametrize(
    ("args", "why"),
    [
        (("--policy", "best"), "known: belady"),
        (("--cache", "0%"), "0 experts of 96"),
        (("--cache", "many"), "cannot read cache size"),
        (("--requests", "3"), "cannot read requests"),
        (("--requests", "9:"), "nothing"),
        (("--half", "third"), "first or second"),
        (("--half", "first", "--requests", "0:1"), "exclude"),
    ],
)
def test_what_is_asked_for_wrongly_is_refused(file: str, args: tuple[str, ...], why: str):
    with pytest.raises(ConfigError, match=why):
        CliRunner().invoke(app, ["replay", file, *args], catch_exceptions=False)
