"""`foregate bench structured`."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from engine.bench import Workload
from engine.bench_structured import STRUCTURES, bench_structured
from engine.config import EngineConfig
from engine.errors import ConfigError
from server.cli import app
from tests.engine.tiny_models import make_checkpoint


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("structured")
    make_checkpoint(directory, "olmoe")
    return directory


def test_each_structure_is_told_beside_the_same_tokens_without(
    directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("logging.basicConfig", lambda **_: None)
    sizes = ("--seqs", "3", "--turns", "1", "--prompt-tokens", "5", "--output-tokens", "8", "--threads", "2")
    command = ("bench", "structured", str(directory), "--kv-memory", "4MiB", *sizes)
    result = CliRunner().invoke(app, [*command, "--json"], catch_exceptions=False)
    told = [json.loads(line) for line in result.stdout.splitlines()]
    assert [one["structure"] for one in told] == list(STRUCTURES)
    for one in told:
        assert (one["num_seqs"], one["num_turns"]) == (3, 1)
        assert one["cost"] == pytest.approx(1 - one["free_step_ms"] / one["structured_step_ms"])
    table = CliRunner().invoke(app, command, catch_exceptions=False).stdout.splitlines()
    assert [line.split()[0] for line in table] == ["structure", *STRUCTURES]


def test_an_unknown_structure_is_answered_with_the_known_ones(directory: Path) -> None:
    with pytest.raises(ConfigError, match="unknown structure 'xml'; known: schema, any-json, regex"):
        next(bench_structured(EngineConfig(model=directory), Workload(), structures=["xml"]))
