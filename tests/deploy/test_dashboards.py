"""deploy/grafana: the dashboards are Grafana's, are what their sources say, and each alert is documented."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from grafana_foundation_sdk.cog.encoder import JSONEncoder
from grafana_foundation_sdk.cog.plugins import register_default_plugins
from grafana_foundation_sdk.models.dashboard import Dashboard

from deploy.grafana.make_dashboards import DASHBOARDS, text_of

DEPLOY = Path(__file__).parents[2] / "deploy"
FILES = sorted((DEPLOY / "grafana" / "dashboards").glob("*.json"))


def lost(before: Any, after: Any, path: str = "") -> list[str]:
    """Where `after` has not what `before` has."""
    if isinstance(before, dict) and isinstance(after, dict):
        return [where for key, value in before.items() for where in lost(value, after.get(key), f"{path}/{key}")]
    if isinstance(before, list) and isinstance(after, list) and len(before) == len(after):
        return [
            where
            for i, (one, other) in enumerate(zip(before, after, strict=True))
            for where in lost(one, other, f"{path}/{i}")
        ]
    return [] if before == after else [path]


def test_the_files_are_what_their_sources_make():
    assert {file.stem for file in FILES} == set(DASHBOARDS)
    for file in FILES:
        assert file.read_text() == text_of(file.stem), "run python -m deploy.grafana.make_dashboards"


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_grafanas_own_schema_knows_every_word_of_them(file: Path):
    register_default_plugins()
    given = json.loads(file.read_text())
    parsed = Dashboard.from_json(json.loads(file.read_text()))
    assert lost(given, json.loads(json.dumps(parsed, cls=JSONEncoder))) == []


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_panels_fill_the_grid_without_covering_each_other(file: Path):
    taken: set[tuple[int, int]] = set()
    panels = json.loads(file.read_text())["panels"]
    assert len({panel["id"] for panel in panels}) == len(panels)
    for panel in panels:
        grid = panel["gridPos"]
        cells = {(grid["x"] + x, grid["y"] + y) for x in range(grid["w"]) for y in range(grid["h"])}
        assert max(x for x, _ in cells) < 24
        assert not cells & taken
        taken |= cells


def test_provisioning_reads_the_dashboards_and_the_data_source_that_compose_mounts():
    compose = yaml.safe_load((DEPLOY / "docker-compose.yml").read_text())["services"]
    mounts = dict(mount.split(":")[:2] for mount in compose["grafana"]["volumes"])
    provider = yaml.safe_load((DEPLOY / "grafana/provisioning/dashboards/foregate.yml").read_text())["providers"][0]
    assert mounts["./grafana/dashboards"] == provider["options"]["path"]
    assert mounts["./grafana/provisioning"] == "/etc/grafana/provisioning"
    source = yaml.safe_load((DEPLOY / "grafana/provisioning/datasources/prometheus.yml").read_text())["datasources"][0]
    assert source["url"] == "http://prometheus:9090"
    assert "prometheus" in compose
    home = compose["grafana"]["environment"]["GF_DASHBOARDS_DEFAULT_HOME_DASHBOARD_PATH"]
    assert (DEPLOY / "grafana/dashboards" / Path(home).name).exists()
