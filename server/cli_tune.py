"""`foregate tune`: finds the fastest tiles for the GPU that is here."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from server.cli_options import LogLevel, directory_of, start_logging
from server.settings import Environment


def tune(
    formats: Annotated[str, typer.Option(help="Of weights to tune for, joined by commas.")] = "bf16,int8,int4",
    model: Annotated[
        str | None, typer.Option(help="Checkpoint whose shapes to tune for [default: Qwen3-30B-A3B's shapes].")
    ] = None,
    out: Annotated[
        Path | None, typer.Option(help="Directory for the file [default: where the kernels look for it].")
    ] = None,
    log_level: LogLevel = "warning",
) -> None:
    """Try the GPU kernels' tiles on this machine's GPU and keep the fastest that compute the same bits. Takes minutes.

    The file has the GPU's name, and is found by it the next time that the kernels are loaded.
    """
    start_logging(log_level)
    from engine.tune import tune as tune_here
    from server.progress import ProgressDisplay

    directory = None if model is None else directory_of(model, Environment())
    with ProgressDisplay() as display:
        report = tune_here([name.strip() for name in formats.split(",") if name.strip()], out, directory, display)
    for gain in report.gains:
        than = "" if gain.ratio is None else f", {gain.ratio:.2f}x the default's speed"
        typer.echo(f"{gain.kernel}, {gain.format}, {gain.variant}: {gain.tile}{than}")
    for name in report.failed:
        typer.echo(f"{name}: no tile computes the reference's numbers; `foregate doctor` says more")
    typer.echo(report.path)
    if report.failed:
        raise typer.Exit(1)
