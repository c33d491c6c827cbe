"""`foregate doctor`: what this machine has, what it does, and whether its kernels are right."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import msgspec
import typer

from server.cli_options import PackedDir

_WORDS = {"ok": "ok", "absent": "--", "bad": "BAD"}


def doctor(
    near: PackedDir = None,
    json: Annotated[bool, typer.Option("--json", help="One JSON object a line: what a report should contain.")] = False,
) -> None:
    """Check software, CPU, memory, disk, kernels and GPU; nothing is changed. Exit code 1 if something is wrong.

    What is not here is marked --, and is wrong only where you need it.
    """
    from engine.doctor import examine

    is_well = True
    for finding in examine(near or Path.cwd()):
        is_well &= finding.verdict != "bad"
        if json:
            typer.echo(msgspec.json.encode(finding).decode())
        else:
            typer.echo(f"{_WORDS[finding.verdict]:>3}  {finding.name}: {finding.text}")
    if not is_well:
        raise typer.Exit(1)
