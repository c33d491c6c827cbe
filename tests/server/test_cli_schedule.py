"""`foregate trace schedule`, `foregate plan` and `foregate bench schedule`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from engine import synthetic
from engine.errors import ConfigError
from server.cli import app
from tests.cache.synthetic_traces import local_trace
from tests.engine.test_bench import TINY
from tests.engine.tiny_models import make_checkpoint


@pytest.fixture(autouse=True)
def _root_logger_is_pytests(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("logging.basicConfig", lambda **_: None)


def run(*args: str, exit_code: int = 0) -> str:
    result = CliRunner().invoke(app, args, catch_exceptions=False)
    assert result.exit_code == exit_code, result.output
    return result.stdout


@pytest.fixture
def file(tmp_path: Path) -> str:
    path = tmp_path / "local.npz"
    local_trace(0, [12] * 10).save(path)
    return str(path)


def test_schedulers_are_compared_at_each_size(file: str):
    args = ("trace", "schedule", file, "--cache", "25%,50%", "--step-seqs", "2,3", "--runnable", "6", "--json")
    rows = [json.loads(line) for line in run(*args).splitlines()]
    assert [(row["cache"], row["step_seqs"], row["whole"]) for row in rows] == [
        (cache, step, whole) for cache in ("25%", "50%") for step in (2, 3) for whole in (False, True)
    ]
    for row in rows:
        assert row["fcfs_records_per_token"] > 0
        assert row["fewer"] == pytest.approx(1 - row["expert_aware_records_per_token"] / row["fcfs_records_per_token"])


def test_the_table_has_a_line_for_each(file: str):
    lines = run("trace", "schedule", file, "--cache", "24", "--step-seqs", "2", "--runnable", "4").splitlines()
    assert lines[0] == "local.npz: 10 requests, 120 tokens; records read a token"
    assert [line.split()[:3] for line in lines[2:]] == [["24", "2", "4"]] * 2


@pytest.mark.parametrize(
    ("args", "why"),
    [(("--step-seqs", "some"), "number of requests"), (("--max-passed-over", "1", "--step-seqs", "2"), "cannot serve")],
)
def test_what_cannot_be_is_refused(file: str, args: tuple[str, ...], why: str):
    with pytest.raises(ConfigError, match=why):
        run("trace", "schedule", file, *args)


@pytest.fixture
def tiny_model(tmp_path: Path) -> Path:
    make_checkpoint(tmp_path / "tiny", "olmoe")
    return tmp_path / "tiny"


# ---- plan ------------------------------------------------------------------------------------------------------------


def test_a_plan_is_told_with_the_command_that_serves_it(tiny_model: Path):
    lines = run("plan", str(tiny_model)).splitlines()
    assert "all experts in memory" in lines[0]
    assert "tokens/s for one sequence" in lines[1]
    assert lines[2].startswith("foregate serve ")


def test_a_plan_as_json(tiny_model: Path):
    plan = json.loads(run("plan", str(tiny_model), "--experts", "int8", "--json"))
    assert plan["fits"]
    assert plan["experts"] == "int8"
    assert plan["hit_rate"] == 1.0


def test_what_does_not_fit_has_exit_code_1(tiny_model: Path):
    assert "does not fit" in run("plan", str(tiny_model), "--kv-memory", "900TiB", exit_code=1)


# ---- bench -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [("--json",), ()])
def test_the_same_tokens_come_of_each_scheduler(options: tuple[str, ...], monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(synthetic.SHAPES, "tiny", TINY)
    args = ("bench", "schedule", "--random", "tiny", "--layers", "2", "--experts", "int8", "--kv-memory", "4MiB")
    small = ("--requests", "6", "--prompt-tokens", "4", "--output-tokens", "8", "--memory", "50%")
    output = run(*args, *small, "--schedulers", "fcfs:2,expert-aware:6/3,expert-aware:6", *options)
    if not options:
        assert [line.split()[1] for line in output.splitlines()[1:]] == ["fcfs:2", "expert-aware:6/3", "expert-aware:6"]
        assert all(line.endswith("yes") for line in output.splitlines()[1:])
        return
    rows: list[dict[str, Any]] = [json.loads(line) for line in output.splitlines()]
    assert [(row["scheduler"], row["max_num_seqs"], row["max_step_seqs"]) for row in rows] == [
        ("fcfs", 2, 2),
        ("expert-aware", 6, 3),
        ("expert-aware", 6, 6),
    ]
    assert all(row["same_tokens"] for row in rows)
    assert all(row["read_mb_per_token"] > 0 for row in rows)
    assert all(row["itl_ms_p99"] >= row["itl_ms_mean"] > 0 for row in rows)


def test_throughput_over_latency_is_drawn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(synthetic.SHAPES, "tiny", TINY)
    path = tmp_path / "page.html"
    args = ("bench", "schedule", "--random", "tiny", "--layers", "2", "--experts", "int8", "--kv-memory", "4MiB")
    small = ("--requests", "2", "--prompt-tokens", "4", "--output-tokens", "4", "--memory", "50%")
    run(*args, *small, "--schedulers", "fcfs:1,fcfs:2", "--html", str(path))
    page = path.read_text(encoding="utf-8")
    data = json.loads(page.partition('id="data">')[2].partition("</script>")[0])
    assert [row["max_num_seqs"] for row in data["rows"]] == [1, 2]
    assert "Schedulers: tiny" in page
    assert "__" not in page.partition("<main>")[0].partition("<style>")[0]


def test_a_scheduler_that_cannot_be_read_is_told():
    with pytest.raises(ConfigError, match="write it like fcfs:16"):
        run("bench", "schedule", "--random", "olmoe", "--schedulers", "best")
