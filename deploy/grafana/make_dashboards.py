"""Writes the dashboards: `python -m deploy.grafana.make_dashboards`. A test holds that they are up to date."""

from __future__ import annotations

import json
from pathlib import Path

from deploy.grafana.boards import experts, http, scheduler, service
from deploy.grafana.panels import dashboard

DASHBOARDS = {
    "service": ("Foregate: service levels", service.ROWS),
    "experts": ("Foregate: expert cache", experts.ROWS),
    "scheduler": ("Foregate: scheduler and KV memory", scheduler.ROWS),
    "http": ("Foregate: HTTP", http.ROWS),
}


def text_of(name: str) -> str:
    """The file's content."""
    return json.dumps(dashboard(name, *DASHBOARDS[name]), indent=1) + "\n"


def main() -> None:
    for name in DASHBOARDS:
        Path(__file__).with_name("dashboards").joinpath(f"{name}.json").write_text(text_of(name), encoding="utf-8")


if __name__ == "__main__":
    main()
