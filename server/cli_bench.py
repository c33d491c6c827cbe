"""`foregate bench`: measuring speed."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import msgspec
import typer

from engine.config import CacheConfig, EngineConfig
from engine.errors import ConfigError
from server.cli_options import (
    KV_MEMORY,
    Dtype,
    ExpertMemory,
    Experts,
    Kernels,
    KvMemory,
    LogLevel,
    Model,
    Threads,
    directory_of,
    start_logging,
)
from server.settings import Environment

app = typer.Typer(help="Measure speed.", no_args_is_help=True)


@app.callback()
def _group() -> None:
    """Measure speed."""


@app.command()
def offline(
    model: Model = "demo",
    random: Annotated[
        str | None, typer.Option(metavar="SHAPE", help="Random weights of a known shape (olmoe, ...) instead of MODEL.")
    ] = None,
    layers: Annotated[int | None, typer.Option(min=1, help="With --random: so many layers.")] = None,
    seqs: Annotated[str, typer.Option(help="Numbers of sequences at once.")] = "1,2,4,8,16,32",
    prompt_tokens: Annotated[int, typer.Option(min=1, help="In each prompt.")] = 128,
    output_tokens: Annotated[int, typer.Option(min=2, help="Of each sequence.")] = 64,
    json: Annotated[bool, typer.Option("--json", help="One JSON object a line.")] = False,
    dtype: Dtype = "auto",
    experts: Experts = "auto",
    kv_memory: KvMemory = KV_MEMORY,
    expert_memory: ExpertMemory = None,
    threads: Threads = None,
    kernels: Kernels = "auto",
    log_level: LogLevel = "warning",
) -> None:
    """Prefill and decode tokens per second of the engine alone, without HTTP."""
    start_logging(log_level)
    from engine.bench import Workload, bench_offline
    from server.progress import ProgressDisplay

    config = EngineConfig(
        model=Path() if random else directory_of(model, Environment()),
        dtype=dtype,  # type: ignore[arg-type]  # checked by EngineConfig
        kv_memory_nbytes=kv_memory,
        num_threads=threads,
        kernels=kernels,
        cache=CacheConfig(format=experts, memory_nbytes=expert_memory),
    )
    workload = Workload(prompt_tokens=prompt_tokens, output_tokens=output_tokens)
    results = bench_offline(
        config, workload, random_shape=random, num_layers=layers, batch_sizes=_numbers(seqs), progress=ProgressDisplay()
    )
    if not json:
        typer.echo(f"{'seqs':>4} {'prefill tok/s':>14} {'decode tok/s':>13} {'step ms':>8} {'outside':>8} {'stall':>6}")
    for r in results:
        if json:
            typer.echo(msgspec.json.encode(r).decode())
        else:
            typer.echo(
                f"{r.num_seqs:4} {r.prefill_tokens_per_s:14.1f} {r.decode_tokens_per_s:13.1f} {r.decode_step_ms:8.1f} "
                f"{r.outside_kernels:8.1%} {r.stall:6.1%}"
            )


def _numbers(text: str) -> list[int]:
    try:
        numbers = [int(part) for part in text.split(",")]
    except ValueError:
        numbers = []
    if not numbers or min(numbers) < 1:
        raise ConfigError(f"--seqs {text!r} is not a list of numbers; write it like 1,8,32")
    return numbers
