"""`foregate serve`: the server, from its options to its end."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer

from engine.config import SchedulerConfig
from engine.errors import ConfigError
from server.cli_engine import Arithmetic, Formats, Memory, Tiers, Weights, engine_config, grouped
from server.cli_options import (
    CpuExperts,
    Device,
    ExpertParallel,
    LogLevel,
    MaxModelLen,
    MaxStepSeqs,
    PackedDir,
    PlacementFile,
    RecordTrace,
    Scheduler,
    Seed,
    TargetItl,
    TargetTtft,
    directory_of,
    name_of,
    start_logging,
)
from server.settings import AppSettings, Environment


@grouped
def serve(
    *,
    weights: Weights,
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="0 takes a free one.")] = 8000,
    formats: Formats,
    max_model_len: MaxModelLen = None,
    scheduler: Scheduler = "expert-aware",
    max_num_seqs: Annotated[int, typer.Option(min=1, help="Requests that run at once.")] = 32,
    max_step_seqs: MaxStepSeqs = None,
    max_num_batched_tokens: Annotated[int, typer.Option(min=1, help="Tokens in one step.")] = 512,
    max_streamed_tokens: Annotated[
        int, typer.Option(min=1, help="Instead, where a prompt's experts have to be streamed.")
    ] = 2048,
    max_queued_tokens: Annotated[int, typer.Option(min=1, help="Of prompts that wait; beyond that 503.")] = 1024**2,
    target_itl: TargetItl = None,
    target_ttft: TargetTtft = None,
    memory: Memory,
    tiers: Tiers,
    device: Device = "cpu",
    cpu_experts: CpuExperts = False,
    expert_parallel: ExpertParallel = 1,
    placement: PlacementFile = None,
    record_trace: RecordTrace = None,
    packed_dir: PackedDir = None,
    served_model_name: Annotated[
        list[str] | None, typer.Option(help="Name in the API; may be given several times [default: MODEL's name].")
    ] = None,
    accept_any_model_name: Annotated[bool, typer.Option(help="Answer whatever model is asked for.")] = False,
    strict_requests: Annotated[bool, typer.Option(help="Refuse unknown request fields.")] = False,
    max_stop_strings: Annotated[int, typer.Option(min=1, max=16, help="That a request may have.")] = 4,
    api_key_file: Annotated[Path | None, typer.Option(help="One API key a line; or set FOREGATE_API_KEY.")] = None,
    open_metrics: Annotated[bool, typer.Option(help="/metrics needs no API key.")] = False,
    metrics_compat: Annotated[
        str, typer.Option(help="vllm or none: its names too in /metrics, which autoscalers read.")
    ] = "vllm",
    seed: Seed = None,
    arithmetic: Arithmetic,
    stall_timeout: Annotated[
        float, typer.Option(min=1, help="Seconds without progress on what is to be done until /live says no.")
    ] = 300.0,
    shutdown_timeout: Annotated[float, typer.Option(min=0, help="Seconds for running requests to end.")] = 30.0,
    shutdown_linger: Annotated[
        float, typer.Option(min=0, help="Seconds to listen on after SIGTERM, while not ready.")
    ] = 5.0,
    log_level: LogLevel = "info",
) -> None:
    """Serve MODEL over the OpenAI API."""
    start_logging(log_level)
    weights.check()
    if metrics_compat not in ("vllm", "none"):
        raise typer.BadParameter(f"{metrics_compat!r} is not one of vllm, none", param_hint="--metrics-compat")
    from engine.async_engine import AsyncEngine
    from engine.build import PLANNED, random_weights
    from server.app import create_app
    from server.auth import hash_key
    from server.context import Lifecycle
    from server.progress import ProgressDisplay
    from server.serve import ShutdownTimes, listen, run

    environment = Environment()
    with (
        listen(host, port) as listener,  # first of all: a port in use is told before anything is loaded
        _directory(weights, environment) as directory,
    ):
        names = tuple(served_model_name or [name_of(weights.model) if weights.random is None else directory.name])
        config = engine_config(directory, formats, memory, tiers, arithmetic, packed_dir=packed_dir)
        config = replace(
            config,
            served_name=names[0],
            max_model_len=max_model_len,
            device=device,
            expert_parallel=expert_parallel,
            placement=placement,
            seed=seed,
            record_trace=record_trace,
            cache=replace(config.cache, cpu_experts=cpu_experts),
            scheduler=SchedulerConfig(
                policy=scheduler,
                max_num_seqs=max_num_seqs,
                max_step_seqs=max_step_seqs,
                max_num_batched_tokens=max_num_batched_tokens,
                max_streamed_tokens=max_streamed_tokens,
                max_queued_tokens=max_queued_tokens,
                target_itl_s=target_itl,
                target_ttft_s=target_ttft,
            ),
        )
        keys = environment.api_keys + (_read_keys(api_key_file) if api_key_file else [])
        settings = AppSettings(
            served_names=names,
            accept_any_model_name=accept_any_model_name,
            strict_requests=strict_requests,
            max_stop_strings=max_stop_strings,
            api_key_hashes=tuple(hash_key(key) for key in keys),
            open_metrics=open_metrics,
            metrics_compat=metrics_compat,  # type: ignore[arg-type]  # checked above
            max_parallel_prompts=max_num_seqs,
            stall_timeout_s=stall_timeout,
        )
        display = ProgressDisplay()
        build = PLANNED if weights.random is None else random_weights(weights.random, weights.layers)
        engine = AsyncEngine(config, progress=display, build=build, in_child=True, stall_timeout_s=stall_timeout)
        lifecycle = Lifecycle()
        run(
            engine,
            create_app(engine, settings, lifecycle=lifecycle),
            lifecycle,
            listener,
            times=ShutdownTimes(timeout_s=shutdown_timeout, linger_s=shutdown_linger),
            display=display,
        )


@contextmanager
def _directory(weights: Weights, environment: Environment) -> Iterator[Path]:
    """Where the checkpoint is; for random weights a place for their packed experts, which is gone afterwards."""
    shape, layers = weights.random, weights.layers
    if shape is None:
        yield directory_of(weights.model, environment)
        return
    with tempfile.TemporaryDirectory(prefix="foregate-random-") as scratch:
        yield Path(scratch) / (f"random-{shape}" if layers is None else f"random-{shape}-{layers}")


def _read_keys(path: Path) -> list[str]:
    keys = [line.strip() for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    if not keys:
        raise ConfigError(f"{path} has no keys in it; write one a line")
    return keys
