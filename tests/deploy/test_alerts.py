"""deploy/prometheus: each alert is explained, fires when it should and not when it should not."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import yaml

from tests.deploy.programs import program

DEPLOY = Path(__file__).parents[2] / "deploy"


def test_each_alert_has_its_words_and_its_place_in_the_documentation():
    text = (DEPLOY.parent / "docs" / "metrics.md").read_text()
    headings = re.findall(r"^### (Foregate\w+)$", text, re.MULTILINE)
    (group,) = yaml.safe_load((DEPLOY / "prometheus" / "alerts.yml").read_text())["groups"]
    assert [rule["alert"] for rule in group["rules"]] == headings
    for rule in group["rules"]:
        assert set(rule["annotations"]) == {"summary", "description", "runbook_url"}
        assert rule["annotations"]["runbook_url"] == f"docs/metrics.md#{rule['alert'].lower()}"
        assert rule["labels"]["severity"] in ("critical", "warning")


def test_each_alert_is_shown_to_fire_and_not_to_fire():
    tests = yaml.safe_load(Path(__file__).with_name("alerts.test.yml").read_text())["tests"]
    (group,) = yaml.safe_load((DEPLOY / "prometheus" / "alerts.yml").read_text())["groups"]
    shown = {(case["alertname"], bool(case["exp_alerts"])) for test in tests for case in test["alert_rule_test"]}
    assert shown == {(rule["alert"], fires) for rule in group["rules"] for fires in (True, False)}


def test_promtool_finds_no_fault_with_the_configuration():
    for arguments in (("config", "prometheus.yml"), ("rules", "rules.yml", "alerts.yml")):
        done = subprocess.run(
            [program("promtool"), "check", *arguments],
            cwd=DEPLOY / "prometheus",
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stdout + done.stderr


def test_each_alert_fires_when_it_should_and_not_when_it_should_not():
    file = Path(__file__).with_name("alerts.test.yml")
    done = subprocess.run([program("promtool"), "test", "rules", file], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
