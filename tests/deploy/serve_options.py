"""What `foregate serve` would understand of a container's command."""

from __future__ import annotations

from typing import Any

import typer.main

from server.cli import app


def parsed_serve(args: list[str]) -> dict[str, Any]:
    """Its parameters; raises click's errors for an option that there is not."""
    command, *options = args
    assert command == "serve"
    group = typer.main.get_command(app)
    serve = group.commands["serve"]  # type: ignore[attr-defined]  # a group has them
    parameters: dict[str, Any] = serve.make_context("serve", options).params
    return parameters
