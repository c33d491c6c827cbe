"""`foregate plan`: what serving a model would be like, before anything is loaded."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Annotated

import msgspec
import typer

from engine.config import CacheConfig, EngineConfig
from server.cli_options import (
    KV_MEMORY,
    Dtype,
    ExpertMemory,
    Experts,
    KvMemory,
    Layers,
    LinkBandwidth,
    LogLevel,
    Model,
    PackedDir,
    RandomShape,
    Threads,
    check_random,
    directory_of,
    name_of,
    start_logging,
)
from server.cli_trace import read_trace
from server.settings import Environment


def plan(
    model: Model = "demo",
    random: RandomShape = None,
    layers: Layers = None,
    trace: Annotated[Path | None, typer.Option(help="Recorded routing of MODEL, for its own hit rate.")] = None,
    dtype: Dtype = "auto",
    experts: Experts = "auto",
    kv_memory: KvMemory = KV_MEMORY,
    expert_memory: ExpertMemory = None,
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
    check_random(model, random, layers)
    from engine.plan import open_checkpoint, plan_serving

    with tempfile.TemporaryDirectory(prefix="foregate-plan-") as scratch:
        directory = Path(scratch) / random if random else directory_of(model, Environment())
        directory.mkdir(exist_ok=True)
        config = EngineConfig(
            model=directory,
            served_name=random or name_of(model),
            dtype=dtype,  # type: ignore[arg-type]  # checked by EngineConfig
            kv_memory_nbytes=kv_memory,
            num_threads=threads,
            cache=CacheConfig(
                format=experts, memory_nbytes=expert_memory, link_bandwidth=link_bandwidth, packed_dir=packed_dir
            ),
        )
        checkpoint = open_checkpoint(directory, random, layers)
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
