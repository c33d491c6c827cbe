"""`foregate serve`: the server, from its options to its end."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer

from engine.config import CacheConfig, EngineConfig, SchedulerConfig
from engine.errors import ConfigError
from server.cli_options import (
    KV_MEMORY,
    CachePolicy,
    CpuExperts,
    Device,
    Dtype,
    ExclusiveTiers,
    ExpertMemory,
    ExpertParallel,
    Experts,
    HostMemory,
    Kernels,
    KvMemory,
    Layers,
    LinkBandwidth,
    LogLevel,
    MaxModelLen,
    MaxStepSeqs,
    Model,
    PackedDir,
    PlacementFile,
    Predictor,
    RandomShape,
    RecordTrace,
    Router,
    Scheduler,
    Seed,
    TargetItl,
    TargetTtft,
    Threads,
    check_random,
    directory_of,
    name_of,
    start_logging,
)
from server.settings import AppSettings, Environment


def serve(
    model: Model = "demo",
    random: RandomShape = None,
    layers: Layers = None,
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="0 takes a free one.")] = 8000,
    dtype: Dtype = "auto",
    experts: Experts = "auto",
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
    kv_memory: KvMemory = KV_MEMORY,
    expert_memory: ExpertMemory = None,
    cache_policy: CachePolicy = "segment",
    predictor: Predictor = "auto",
    host_memory: HostMemory = None,
    exclusive_tiers: ExclusiveTiers = False,
    link_bandwidth: LinkBandwidth = None,
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
    seed: Seed = None,
    threads: Threads = None,
    kernels: Kernels = "auto",
    router: Router = "auto",
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
    check_random(model, random, layers)
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
        _directory(model, random, layers, environment) as directory,
    ):
        names = tuple(served_model_name or [name_of(model) if random is None else directory.name])
        config = EngineConfig(
            model=directory,
            served_name=names[0],
            dtype=dtype,  # type: ignore[arg-type]  # checked by EngineConfig
            max_model_len=max_model_len,
            kv_memory_nbytes=kv_memory,
            num_threads=threads,
            device=device,
            expert_parallel=expert_parallel,
            placement=placement,
            kernels=kernels,
            router=router,
            seed=seed,
            record_trace=record_trace,
            cache=CacheConfig(
                format=experts,
                memory_nbytes=expert_memory,
                policy=cache_policy,
                predictor=predictor,
                host_memory_nbytes=host_memory,
                exclusive_tiers=exclusive_tiers,
                link_bandwidth=link_bandwidth,
                cpu_experts=cpu_experts,
                packed_dir=packed_dir,
            ),
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
            max_parallel_prompts=max_num_seqs,
            stall_timeout_s=stall_timeout,
        )
        display = ProgressDisplay()
        build = PLANNED if random is None else random_weights(random, layers)
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
def _directory(model: str, shape: str | None, layers: int | None, environment: Environment) -> Iterator[Path]:
    """Where the checkpoint is; for random weights a place for their packed experts, which is gone afterwards."""
    if shape is None:
        yield directory_of(model, environment)
        return
    with tempfile.TemporaryDirectory(prefix="foregate-random-") as scratch:
        yield Path(scratch) / (f"random-{shape}" if layers is None else f"random-{shape}-{layers}")


def _read_keys(path: Path) -> list[str]:
    keys = [line.strip() for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    if not keys:
        raise ConfigError(f"{path} has no keys in it; write one a line")
    return keys
