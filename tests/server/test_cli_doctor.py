"""server/cli_doctor.py: `foregate doctor`."""

from __future__ import annotations

import json

import pytest
from typer.testing import CliRunner

import engine.doctor
from engine.doctor import Finding
from server.cli import app


def run(monkeypatch: pytest.MonkeyPatch, *args: str, verdict: str = "ok"):
    findings = [Finding("CPU", "ok", "fast"), Finding("GPU", "absent", "none"), Finding("link", verdict, "8GiB/s")]  # type: ignore[arg-type]
    monkeypatch.setattr(engine.doctor, "examine", lambda near: iter(findings))
    return CliRunner().invoke(app, ["doctor", *args])


def test_each_finding_is_a_line_with_its_verdict(monkeypatch: pytest.MonkeyPatch):
    done = run(monkeypatch)
    assert done.output.splitlines() == [" ok  CPU: fast", " --  GPU: none", " ok  link: 8GiB/s"]
    assert done.exit_code == 0


def test_something_wrong_is_told_by_the_exit_code_and_json_is_for_reports(monkeypatch: pytest.MonkeyPatch):
    done = run(monkeypatch, "--json", verdict="bad")
    assert done.exit_code == 1
    assert json.loads(done.output.splitlines()[2]) == {"name": "link", "verdict": "bad", "text": "8GiB/s"}
