"""`foregate bench structured`."""

from __future__ import annotations

from typing import Annotated

import msgspec
import typer

from engine.config import CacheConfig, EngineConfig
from server.cli_options import (
    KV_MEMORY,
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


def structured(
    model: Model = "demo",
    seqs: Annotated[int, typer.Option(min=1, help="Sequences at once.")] = 16,
    turns: Annotated[int, typer.Option(min=1, help="Of each, with and without.")] = 6,
    prompt_tokens: Annotated[int, typer.Option(min=1, help="In each prompt.")] = 128,
    output_tokens: Annotated[int, typer.Option(min=3, help="Of each answer.")] = 64,
    temperature: Annotated[float, typer.Option(min=0.0, help="Sampling costs time too.")] = 0.0,
    top_p: Annotated[float, typer.Option(min=0.01, max=1.0, help="With a temperature.")] = 1.0,
    json: Annotated[bool, typer.Option("--json", help="One JSON object a line.")] = False,
    experts: Experts = "auto",
    kv_memory: KvMemory = KV_MEMORY,
    expert_memory: ExpertMemory = None,
    threads: Threads = None,
    kernels: Kernels = "auto",
    log_level: LogLevel = "warning",
) -> None:
    """What structured output costs in decode speed, beside the same tokens without it."""
    start_logging(log_level)
    from engine.bench import Workload
    from engine.bench_structured import bench_structured
    from server.progress import ProgressDisplay

    config = EngineConfig(
        model=directory_of(model, Environment()),
        kv_memory_nbytes=kv_memory,
        num_threads=threads,
        kernels=kernels,
        cache=CacheConfig(format=experts, memory_nbytes=expert_memory),
    )
    workload = Workload(prompt_tokens=prompt_tokens, output_tokens=output_tokens, temperature=temperature, top_p=top_p)
    results = bench_structured(config, workload, num_seqs=seqs, num_turns=turns, progress=ProgressDisplay())
    if not json:
        typer.echo(f"{'structure':10} {'seqs':>4} {'turns':>5} {'free, step ms':>13} {'structured':>10} {'cost':>6}")
    for r in results:
        if json:
            typer.echo(msgspec.json.encode(r).decode())
        else:
            typer.echo(
                f"{r.structure:10} {r.num_seqs:4} {r.num_turns:5} {r.free_step_ms:13.2f} {r.structured_step_ms:10.2f} "
                f"{r.cost:6.1%}"
            )
