"""`foregate plan`: what serving a model would be like, before anything is loaded."""

from __future__ import annotations

import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import msgspec
import typer

from server.cli_engine import Arithmetic, Formats, Memory, Tiers, Weights, engine_config, grouped
from server.cli_options import (
    LinkBandwidth,
    LogLevel,
    PackedDir,
    Threads,
    name_of,
    start_logging,
)
from server.cli_trace import read_trace


@grouped
def plan(
    *,
    weights: Weights,
    trace: Annotated[Path | None, typer.Option(help="Recorded routing of MODEL, for its own hit rate.")] = None,
    formats: Formats,
    memory: Memory,
    link_bandwidth: LinkBandwidth = None,
    packed_dir: PackedDir = None,
    threads: Threads = None,
    json: Annotated[bool, typer.Option("--json", help="One JSON object.")] = False,
    log_level: LogLevel = "error",
) -> None:
    """Does MODEL fit here, in which format, how fast, what will it wait for, and the command that serves it so.

    Exit code 1 if it does not fit.
    """
    start_logging(log_level)
    weights.check()
    from engine.plan import open_checkpoint, plan_serving

    with tempfile.TemporaryDirectory(prefix="foregate-plan-") as scratch:
        directory = Path(scratch) / weights.random if weights.random else weights.directory()
        directory.mkdir(exist_ok=True)
        tiers = Tiers(link_bandwidth=link_bandwidth)
        config = replace(
            engine_config(directory, formats, memory, tiers, Arithmetic(threads), packed_dir=packed_dir),
            served_name=weights.random or name_of(weights.model),
        )
        checkpoint = open_checkpoint(directory, weights.random, weights.layers)
        made = plan_serving(config, checkpoint, None if trace is None else read_trace(trace))
    if json:
        typer.echo(msgspec.json.encode(made).decode())
    else:
        for line in made.lines():
            typer.echo(line)
        if made.fits:
            typer.echo(made.command)
    if not made.fits:
        raise typer.Exit(1)
