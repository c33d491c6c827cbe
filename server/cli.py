"""The command line. Every command imports what it needs when it runs, so that `foregate --version` is instant."""

from __future__ import annotations

import asyncio
import logging
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer

from engine.config import CacheConfig, EngineConfig, SchedulerConfig
from engine.errors import ConfigError, EngineDead, EngineOverloaded
from engine.threads import wait_passively
from server import cli_analyze, cli_bench_experts, cli_plan, cli_schedule, cli_simulate, cli_trace
from server.cli_options import (
    KV_MEMORY,
    CachePolicy,
    Dtype,
    ExclusiveTiers,
    ExpertMemory,
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

_log = logging.getLogger("foregate.cli")

app = typer.Typer(
    help="Serve Mixture-of-Experts language models that do not fit in fast memory.",
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    add_completion=False,
    no_args_is_help=True,
)
app.add_typer(cli_bench_experts.app, name="bench")
app.add_typer(cli_trace.app, name="trace")
cli_simulate.register(app, cli_bench_experts.app)
app.command()(cli_analyze.analyze)
app.command()(cli_plan.plan)
cli_trace.app.command()(cli_schedule.schedule)


def main() -> None:
    """The console script. What the user can cure is one line on stderr and exit code 1; usage errors are 2."""
    wait_passively()  # for whatever imports torch
    try:
        app()
    except (ValueError, OSError, EngineDead, EngineOverloaded) as exc:
        _log.debug("the error's origin:", exc_info=exc)
        typer.echo(f"error: {exc}", err=True)
        sys.exit(1)


@app.callback(invoke_without_command=True)
def _root(version: Annotated[bool, typer.Option("--version", help="Print the version and exit.")] = False) -> None:
    if version:
        from server.context import VERSION

        typer.echo(f"foregate {VERSION}")
        raise typer.Exit


@app.command()
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
    target_itl: TargetItl = None,
    target_ttft: TargetTtft = None,
    kv_memory: KvMemory = KV_MEMORY,
    expert_memory: ExpertMemory = None,
    cache_policy: CachePolicy = "segment",
    predictor: Predictor = "auto",
    host_memory: HostMemory = None,
    exclusive_tiers: ExclusiveTiers = False,
    link_bandwidth: LinkBandwidth = None,
    record_trace: RecordTrace = None,
    packed_dir: PackedDir = None,
    served_model_name: Annotated[
        list[str] | None, typer.Option(help="Name in the API; may be given several times [default: MODEL's name].")
    ] = None,
    accept_any_model_name: Annotated[bool, typer.Option(help="Answer whatever model is asked for.")] = False,
    strict_requests: Annotated[bool, typer.Option(help="Refuse unknown request fields.")] = False,
    api_key_file: Annotated[Path | None, typer.Option(help="One API key a line; or set FOREGATE_API_KEY.")] = None,
    open_metrics: Annotated[bool, typer.Option(help="/metrics needs no API key.")] = False,
    seed: Seed = None,
    threads: Threads = None,
    kernels: Kernels = "auto",
    router: Router = "auto",
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
    from engine.plan import planned_engine
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
                packed_dir=packed_dir,
            ),
            scheduler=SchedulerConfig(
                policy=scheduler,
                max_num_seqs=max_num_seqs,
                max_step_seqs=max_step_seqs,
                max_num_batched_tokens=max_num_batched_tokens,
                max_streamed_tokens=max_streamed_tokens,
                target_itl_s=target_itl,
                target_ttft_s=target_ttft,
            ),
        )
        keys = environment.api_keys + (_read_keys(api_key_file) if api_key_file else [])
        settings = AppSettings(
            served_names=names,
            accept_any_model_name=accept_any_model_name,
            strict_requests=strict_requests,
            api_key_hashes=tuple(hash_key(key) for key in keys),
            open_metrics=open_metrics,
            max_parallel_prompts=max_num_seqs,
        )
        display = ProgressDisplay()
        build: Callable[..., Any] = planned_engine
        if random is not None:
            from engine.synthetic import random_engine

            build = partial(random_engine, random, layers)
        engine = AsyncEngine(config, progress=display, build=build)
        lifecycle = Lifecycle()
        run(
            engine,
            create_app(engine, settings, lifecycle=lifecycle),
            lifecycle,
            listener,
            times=ShutdownTimes(timeout_s=shutdown_timeout, linger_s=shutdown_linger),
            display=display,
        )


@app.command()
def chat(
    model: Model = "demo",
    once: Annotated[str | None, typer.Option(metavar="PROMPT", help="Answer this and exit.")] = None,
    url: Annotated[str | None, typer.Option(help="Talk to this server instead of loading a model.")] = None,
    temperature: Annotated[float, typer.Option(min=0, max=2, help="0: the same answer every time.")] = 0.0,
    max_tokens: Annotated[int, typer.Option(min=1, help="Longest answer.")] = 512,
    dtype: Dtype = "auto",
    experts: Experts = "auto",
    max_model_len: MaxModelLen = None,
    kv_memory: KvMemory = KV_MEMORY,
    expert_memory: ExpertMemory = None,
    packed_dir: PackedDir = None,
    seed: Seed = None,
    threads: Threads = None,
    kernels: Kernels = "auto",
    router: Router = "auto",
    log_level: LogLevel = "warning",
) -> None:
    """Talk to MODEL in the terminal, or to a running server with --url."""
    start_logging(log_level)
    from server.chat_terminal import chat_in_process, chat_with_server

    environment = Environment()
    if url is not None:
        fields = {"temperature": temperature, "max_tokens": max_tokens, **({} if seed is None else {"seed": seed})}
        asyncio.run(chat_with_server(url, environment.api_keys, fields, once))
        return
    config = EngineConfig(
        model=directory_of(model, environment),
        served_name=name_of(model),
        dtype=dtype,  # type: ignore[arg-type]  # checked by EngineConfig
        max_model_len=max_model_len,
        kv_memory_nbytes=kv_memory,
        num_threads=threads,
        kernels=kernels,
        router=router,
        seed=seed,
        cache=CacheConfig(format=experts, memory_nbytes=expert_memory, packed_dir=packed_dir),
        scheduler=SchedulerConfig(max_num_seqs=1),
    )
    asyncio.run(chat_in_process(config, temperature=temperature, max_tokens=max_tokens, once=once))


@app.command()
def pull(model: Model = "demo", log_level: LogLevel = "warning") -> None:
    """Download MODEL (`demo` or a hub name) and say where it is."""
    start_logging(log_level)
    from engine.hub import pull as pull_model
    from server.progress import ProgressDisplay

    with ProgressDisplay() as display:
        directory = pull_model(model, Environment().home, display)
    typer.echo(directory)


@app.command()
def convert(
    model: Model = "demo", experts: Experts = "int8", packed_dir: PackedDir = None, log_level: LogLevel = "warning"
) -> None:
    """Pack the experts of MODEL for serving, which otherwise happens when it is first served."""
    start_logging(log_level)
    from engine.convert import convert as convert_model
    from server.progress import ProgressDisplay

    directory = directory_of(model, Environment())
    with ProgressDisplay() as display:
        packed = convert_model(directory, experts, packed_dir, display)
    typer.echo(packed)


@app.command("train-predictor")
def train_predictor(
    model: Model = "demo",
    experts: Experts = "auto",
    packed_dir: PackedDir = None,
    prompts: Annotated[
        Path | None, typer.Option(help="A prompt a line, of the traffic to come [default: those of Foregate].")
    ] = None,
    tokens: Annotated[int, typer.Option(min=256, help="To learn from.")] = 16_384,
    seed: Seed = None,
    log_level: LogLevel = "warning",
) -> None:
    """Learn to foretell the routing of MODEL, so that experts that do not fit in memory are read in time."""
    start_logging(log_level)
    from engine.train_predictor import train_predictor as train
    from server.progress import ProgressDisplay

    config = EngineConfig(
        model=directory_of(model, Environment()), cache=CacheConfig(format=experts, packed_dir=packed_dir)
    )
    texts = [] if prompts is None else list(filter(None, prompts.read_text(encoding="utf-8").splitlines()))
    with ProgressDisplay() as display:
        path, recalls = train(config, prompts=texts, max_tokens=tokens, seed=seed or 0, progress=display)
    for recall in recalls:
        typer.echo(
            f"{recall.distance} layers ahead: the probe foretells {recall.probe:.1%} of the routed experts, "
            f"the later layers' own routers {recall.stale_gate:.1%}"
        )
    typer.echo(path)


@app.command()
def refactor(
    source: Annotated[Path, typer.Argument(help="A dense Llama checkpoint: a directory or a .gguf file.")],
    out: Annotated[Path, typer.Argument(help="The directory to write; must not exist.")],
    num_experts: Annotated[int, typer.Option(min=1, help="Routed experts in each layer.")] = 16,
    shared_size: Annotated[int, typer.Option(min=1, help="Neurons of the expert that is always on.")] = 512,
    num_active: Annotated[int, typer.Option(min=1, help="Routed experts that each token uses.")] = 12,
    dense_layers: Annotated[str, typer.Option(help="Layers that stay whole, like 0-8,29.")] = "",
    distil_tokens: Annotated[
        int, typer.Option(min=0, help="Tokens to distil on after the split, a million in an hour for a small model.")
    ] = 0,
    rank: Annotated[int, typer.Option(min=1, help="Of the changes to each weight that distillation makes.")] = 12,
    state: Annotated[
        Path | None, typer.Option(help="File that distillation is kept in; given again, it goes on from there.")
    ] = None,
    calibration: Annotated[
        list[Path] | None,
        typer.Option(
            help="Text to learn from, a domain each; may be given several times [default: Python's help texts]"
        ),
    ] = None,
    plan: Annotated[Path | None, typer.Option(help="Use this plan instead of learning one.")] = None,
    save_plan: Annotated[Path | None, typer.Option(help="Keep what was learned in this file.")] = None,
    dtype: Annotated[str, typer.Option(help="Of what is written: bfloat16 or float32.")] = "bfloat16",
    seed: Annotated[int, typer.Option(help="Of the sampling of the text.")] = 0,
    log_level: LogLevel = "warning",
) -> None:
    """Split a dense model's layers into experts and write the MoE, which serves like any other."""
    start_logging(log_level)
    from engine.refactor.command import LOCALITY_RATIO, LOCALITY_WINDOW
    from engine.refactor.command import refactor as refactor_model
    from server.progress import ProgressDisplay

    with ProgressDisplay() as display:
        report = refactor_model(
            source,
            out,
            num_experts=num_experts,
            shared_size=shared_size,
            num_active=num_active,
            dense_layers=_layers(dense_layers),
            distil_tokens=distil_tokens,
            rank=rank,
            state=state,
            calibration=calibration,
            plan=plan,
            save_plan=save_plan,
            dtype=dtype,
            seed=seed,
            progress=display,
        )
    for measured in report.perplexities:
        typer.echo(
            f"perplexity of {measured.name}: {measured.dense:.2f} dense, "
            f"{measured.refactored:.2f} refactored ({measured.ratio:.2f}x)"
        )
    locality = report.locality
    srp = "" if locality.srp is None else f"SRP({LOCALITY_WINDOW}) {locality.srp:.2f}, "
    used = locality.popularity
    typer.echo(
        f"routing: {srp}SCH({LOCALITY_WINDOW}, {LOCALITY_RATIO:.0f}) {locality.sch:.2f}; an expert serves "
        f"{used.min():.0%} to {used.max():.0%} of the tokens; domains differ by {locality.specialisation:.0%}"
    )
    typer.echo(f"{report.out}: {report.active_share:.0%} of the FFNs active, made in {report.seconds:.0f} s")


def _layers(text: str) -> list[int]:
    """'0-2,7' -> [0, 1, 2, 7]. Raises `ConfigError`."""
    layers: list[int] = []
    for part in filter(None, text.split(",")):
        first, _, last = part.partition("-")
        if not (first.strip().isdigit() and (last or first).strip().isdigit()):
            raise ConfigError(f"cannot read layers {text!r}; write them like 0-8,29")
        layers += range(int(first), int(last or first) + 1)
    return layers


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
