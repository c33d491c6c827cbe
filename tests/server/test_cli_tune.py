"""server/cli_tune.py: `foregate tune`."""

from __future__ import annotations

from pathlib import Path

import pytest
from typer.testing import CliRunner

import engine.tune
from engine.tune import Gain, TuneReport
from server.cli import app


@pytest.mark.parametrize("failed", [[], ["linear, int4"]])
def test_what_was_gained_is_told_and_what_failed_by_the_exit_code(monkeypatch: pytest.MonkeyPatch, failed: list[str]):
    asked: list[object] = []

    def tune(formats: list[str], directory: Path | None, *rest: object) -> TuneReport:
        asked.extend([formats, directory])
        gains = [
            Gain("linear", "int8", "decode", "16x64, 4w, 2s", 1.25),
            Gain("linear", "int8", "prefill", "32x64, 4w, 2s", None),
        ]
        return TuneReport("A GPU", Path("a-gpu.json"), gains, failed)

    monkeypatch.setattr(engine.tune, "tune", tune)
    done = CliRunner().invoke(app, ["tune", "--formats", "int8, int4", "--out", "there"])
    assert asked == [["int8", "int4"], Path("there")]
    lines = done.output.splitlines()
    assert lines[:2] == [
        "linear, int8, decode: 16x64, 4w, 2s, 1.25x the default's speed",
        "linear, int8, prefill: 32x64, 4w, 2s",
    ]
    assert lines[-1] == "a-gpu.json"
    assert done.exit_code == (1 if failed else 0)
    assert ("no tile computes the reference's numbers" in done.output) == bool(failed)
