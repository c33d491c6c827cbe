"""server/cli_placement.py: `foregate trace placement`."""

from __future__ import annotations

import re
from pathlib import Path

from typer.testing import CliRunner

from cache.placement import load_placement
from server.cli import app
from tests.cache.synthetic_traces import local_trace


def test_both_halves_imbalances_are_told_and_the_placement_is_written(tmp_path: Path):
    local_trace(0, [40] * 4, num_layers=2, num_experts=8, active=2).save(tmp_path / "t.npz")
    args = ["trace", "placement", str(tmp_path / "t.npz"), "--ranks", "2", "--window", "8", "--seconds", "0.5"]
    done = CliRunner().invoke(app, [*args, "--out", str(tmp_path / "p.json")], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    rows = re.findall(r"80 tokens: ([\d.]+) in turn, ([\d.]+) placed", done.output)
    assert len(rows) == 2
    assert float(rows[0][1]) < float(rows[0][0])
    load_placement(tmp_path / "p.json").check(2, 8)
