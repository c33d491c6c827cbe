"""What a dashboard is made of, and how that is written in Grafana's own format."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

DATASOURCE = {"type": "prometheus", "uid": "${datasource}"}
_WIDTH, _HEIGHT = 24, 8  # of the grid, and of a panel unless it says otherwise
_QUANTILES = (0.5, 0.95, 0.99)


@dataclass(frozen=True)
class Query:
    """PromQL, in which LABELS stands for the chosen models and servers, and what its series are called."""

    expr: str
    legend: str = ""


@dataclass(frozen=True)
class Panel:
    title: str
    description: str
    unit: str
    queries: tuple[Query, ...]
    width: int = 8
    kind: str = "timeseries"
    stacked: bool = False
    log: bool = False
    min: float | None = 0
    max: float | None = None
    steps: tuple[tuple[float | None, str], ...] = ((None, "green"),)


@dataclass(frozen=True)
class Row:
    title: str
    panels: tuple[Panel, ...]


def rate(name: str, *labels: str) -> str:
    """Per second, of all the chosen servers together."""
    by = f" by ({', '.join(labels)})" if labels else ""
    return f"sum{by} (rate({name}{{LABELS}}[$__rate_interval]))"


def share(part: str, whole: str, *labels: str) -> str:
    return f"{rate(part, *labels)} / {rate(whole, *labels)}"


def mean(histogram: str, *labels: str) -> str:
    return share(f"{histogram}_sum", f"{histogram}_count", *labels)


def quantiles(histogram: str, *which: float) -> tuple[Query, ...]:
    of = rate(f"{histogram}_bucket", "le")
    return tuple(Query(f"histogram_quantile({q}, {of})", f"p{q * 100:g}") for q in which or _QUANTILES)


def dashboard(name: str, title: str, rows: Sequence[Row]) -> dict[str, Any]:
    """In Grafana's own format, of schema version 39 (Grafana 11 and later read it)."""
    panels: list[dict[str, Any]] = []
    y = 0
    for row in rows:
        panels.append(
            {
                "id": len(panels) + 1,
                "type": "row",
                "title": row.title,
                "collapsed": False,
                "panels": [],
                "gridPos": {"x": 0, "y": y, "w": _WIDTH, "h": 1},
            }
        )
        y, x, tallest = y + 1, 0, 0
        for panel in row.panels:
            height = 4 if panel.kind in ("stat", "state") else _HEIGHT
            if x + panel.width > _WIDTH:
                y, x, tallest = y + tallest, 0, 0
            grid = {"x": x, "y": y, "w": panel.width, "h": height}
            panels.append({"id": len(panels) + 1, "gridPos": grid, **_panel(panel)})
            x, tallest = x + panel.width, max(tallest, height)
        y += tallest
    return {
        "uid": f"foregate-{name}",
        "title": title,
        "tags": ["foregate"],
        "schemaVersion": 39,
        "version": 1,
        "editable": True,
        "graphTooltip": 1,
        "refresh": "10s",
        "time": {"from": "now-1h", "to": "now"},
        "timezone": "browser",
        "links": [
            {
                "type": "dashboards",
                "title": "Foregate",
                "tags": ["foregate"],
                "asDropdown": False,
                "includeVars": True,
                "keepTime": True,
            }
        ],
        "annotations": {"list": []},
        "templating": {
            "list": [
                {"name": "datasource", "label": "Prometheus", "type": "datasource", "query": "prometheus"},
                _variable("model", "Model", "label_values(foregate_engine_state, model_name)"),
                _variable("instance", "Server", 'label_values(foregate_engine_state{model_name=~"$model"}, instance)'),
            ]
        },
        "panels": panels,
    }


def _variable(name: str, label: str, query: str) -> dict[str, Any]:
    return {
        "name": name,
        "label": label,
        "type": "query",
        "datasource": DATASOURCE,
        "query": {"query": query, "refId": name},
        "refresh": 2,
        "includeAll": True,
        "allValue": ".*",
        "multi": True,
        "current": {"text": "All", "value": "$__all"},
        "sort": 1,
    }


def _panel(panel: Panel) -> dict[str, Any]:
    is_heatmap, is_instant = panel.kind == "heatmap", panel.kind in ("stat", "state")
    targets = [
        {
            "refId": chr(ord("A") + i),
            "datasource": DATASOURCE,
            "expr": query.expr.replace("LABELS", 'model_name=~"$model",instance=~"$instance"'),
            "legendFormat": query.legend or "__auto",
            "format": "heatmap" if is_heatmap else "time_series",
            "instant": is_instant,
            "range": not is_instant,
        }
        for i, query in enumerate(panel.queries)
    ]
    steps = [{"value": value, "color": color} for value, color in panel.steps]
    defaults: dict[str, Any] = {"unit": panel.unit, "thresholds": {"mode": "absolute", "steps": steps}}
    if panel.min is not None:
        defaults["min"] = panel.min
    if panel.max is not None:
        defaults["max"] = panel.max
    kind, options = _KINDS[panel.kind]
    if panel.kind == "timeseries":
        defaults["custom"] = {
            "lineWidth": 1,
            "fillOpacity": 30 if panel.stacked else 10,
            "showPoints": "never",
            "stacking": {"mode": "normal" if panel.stacked else "none", "group": "A"},
            "scaleDistribution": {"type": "log", "log": 10} if panel.log else {"type": "linear"},
        }
    return {
        "type": kind,
        "title": panel.title,
        "description": panel.description,
        "datasource": DATASOURCE,
        "targets": targets,
        "fieldConfig": {"defaults": defaults, "overrides": []},
        "options": options,
    }


_KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "timeseries": (
        "timeseries",
        {
            "legend": {"displayMode": "list", "placement": "bottom", "showLegend": True, "calcs": []},
            "tooltip": {"mode": "multi", "sort": "desc"},
        },
    ),
    "stat": (
        "stat",
        {
            "colorMode": "value",
            "graphMode": "none",
            "justifyMode": "auto",
            "textMode": "value",
            "reduceOptions": {"calcs": ["lastNotNull"], "fields": "", "values": False},
        },
    ),
    "state": (
        "stat",
        {
            "colorMode": "none",
            "graphMode": "none",
            "justifyMode": "auto",
            "textMode": "name",
            "reduceOptions": {"calcs": ["lastNotNull"], "fields": "", "values": False},
        },
    ),
    "heatmap": (
        "heatmap",
        {
            "calculate": False,
            "cellGap": 1,
            "color": {
                "mode": "scheme",
                "scheme": "Blues",
                "steps": 64,
                "reverse": False,
                "exponent": 0.5,
                "fill": "blue",
            },
            "yAxis": {"unit": "s", "axisPlacement": "left", "reverse": False},
            "rowsFrame": {"layout": "auto"},
            "legend": {"show": True},
            "filterValues": {"le": 1e-9},
            "showValue": "never",
        },
    ),
}
