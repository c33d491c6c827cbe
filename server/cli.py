"""The command line. Every command imports what it needs when it runs, so that `foregate --version` is instant."""

from __future__ import annotations

import asyncio
import logging
import sys
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer

from engine.config import CacheConfig, EngineConfig, SchedulerConfig
from engine.errors import ConfigError, EngineDead, EngineOverloaded
from engine.threads import wait_passively
from server import (
    cli_analyze,
    cli_bench_experts,
    cli_bench_structured,
    cli_doctor,
    cli_placement,
    cli_plan,
    cli_schedule,
    cli_serve,
    cli_simulate,
    cli_trace,
    cli_tune,
)
from server.cli_engine import Arithmetic, Formats, Memory, engine_config, grouped
from server.cli_options import (
    Experts,
    LogLevel,
    MaxModelLen,
    Model,
    PackedDir,
    Seed,
    directory_of,
    name_of,
    start_logging,
)
from server.settings import Environment

_log = logging.getLogger("foregate.cli")

app = typer.Typer(
    help="Serve Mixture-of-Experts language models that do not fit in fast memory.",
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    add_completion=False,
    no_args_is_help=True,
)
app.command()(cli_serve.serve)
cli_bench_experts.app.command()(cli_bench_structured.structured)
app.add_typer(cli_bench_experts.app, name="bench")
app.add_typer(cli_trace.app, name="trace")
cli_simulate.register(app, cli_bench_experts.app)
app.command()(cli_analyze.analyze)
app.command()(cli_plan.plan)
app.command()(cli_doctor.doctor)
app.command()(cli_tune.tune)
cli_trace.app.command()(cli_schedule.schedule)
cli_trace.app.command()(cli_placement.placement)


def main() -> None:
    """The console script. What the user can cure is one line on stderr and exit code 1; usage errors are 2."""
    wait_passively()  # for whatever imports torch
    try:
        app()
    except (ValueError, OSError, EngineDead, EngineOverloaded) as exc:
        _log.debug("the error's origin:", exc_info=exc)
        typer.echo(f"error: {_in_words(exc)}", err=True)
        sys.exit(1)


def _in_words(exc: Exception) -> str:
    if isinstance(exc, OSError) and exc.filename is not None and exc.strerror and len(exc.args) > 1:
        return f"{exc.filename}: {exc.strerror}"
    return str(exc)


@app.callback(invoke_without_command=True)
def _root(version: Annotated[bool, typer.Option("--version", help="Print the version and exit.")] = False) -> None:
    if version:
        from server.context import VERSION

        typer.echo(f"foregate {VERSION}")
        raise typer.Exit


@app.command()
@grouped
def chat(
    *,
    model: Model = "demo",
    once: Annotated[str | None, typer.Option(metavar="PROMPT", help="Answer this and exit.")] = None,
    url: Annotated[str | None, typer.Option(help="Talk to this server instead of loading a model.")] = None,
    temperature: Annotated[float, typer.Option(min=0, max=2, help="0: the same answer every time.")] = 0.0,
    max_tokens: Annotated[int, typer.Option(min=1, help="Longest answer.")] = 512,
    formats: Formats,
    max_model_len: MaxModelLen = None,
    memory: Memory,
    packed_dir: PackedDir = None,
    seed: Seed = None,
    arithmetic: Arithmetic,
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
    config = engine_config(directory_of(model, environment), formats, memory, arithmetic, packed_dir=packed_dir)
    config = replace(
        config,
        served_name=name_of(model),
        max_model_len=max_model_len,
        seed=seed,
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
        learned = train(config, prompts=texts, max_tokens=tokens, seed=seed or 0, progress=display)
    for recall in learned.probe:
        typer.echo(
            f"{recall.distance} layers ahead: the probe foretells {recall.probe:.1%} of the routed experts, "
            f"the later layers' own routers {recall.stale_gate:.1%}"
        )
    typer.echo(f"all layers, from the tokens alone: the path router foretells {learned.path:.1%}")
    for path in learned.paths:
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
