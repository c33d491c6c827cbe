"""`foregate calibrate`, `foregate simulate` and `foregate bench simulate`: speed, foretold from costs and routing."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import msgspec
import typer

from engine.config import EngineConfig
from engine.errors import ConfigError
from server.cli_bench import RoutingSkew
from server.cli_engine import Arithmetic, Formats, Group, Tiers, Weights, engine_config, grouped
from server.cli_options import (
    CachePolicy,
    ExclusiveTiers,
    HostMemory,
    LogLevel,
    PackedDir,
    Threads,
    rate,
    start_logging,
)
from server.cli_trace import num_slots_of, read_trace
from server.settings import Environment

if TYPE_CHECKING:
    from cache.trace import RoutingTrace
    from engine.bench_simulate import Validation
    from engine.calibration import Calibration
    from engine.simulate import SimulationResult

_GIB = 1024**3
CalibrationFile = Annotated[Path | None, typer.Option(help="What `foregate calibrate` wrote.")]
Links = Annotated[str, typer.Option("--link", help="Rates of the link from below, like 8GiB/s; own: the machine's.")]


@grouped
def calibrate(
    *,
    weights: Weights,
    routing_skew: RoutingSkew = 0.5,
    out: Annotated[Path | None, typer.Option(help="The file to write [default: beside the packed experts]")] = None,
    formats: Formats,
    cache_policy: CachePolicy = "segment",
    packed_dir: PackedDir = None,
    threads: Threads = None,
    log_level: LogLevel = "error",
) -> None:
    """Measure what serving MODEL costs on this machine, for `foregate simulate`. Takes up to a minute."""
    start_logging(log_level)
    weights.check()
    from engine.calibrate import Subject, calibration_path
    from engine.calibrate import calibrate as measure
    from server.progress import ProgressDisplay

    with _config(weights, formats, Tiers(cache_policy), Arithmetic(threads), packed_dir=packed_dir) as config:
        subject = Subject(
            config=config, random_shape=weights.random, num_layers=weights.layers, routing_skew=routing_skew
        )
        with ProgressDisplay() as display:
            measured = measure(subject, display)
        path = out or calibration_path(subject, Environment().home / "calibrations")
    measured.save(path)
    typer.echo(msgspec.json.format(msgspec.json.encode(measured), indent=2).decode())
    typer.echo(path)


def simulate(
    trace: Annotated[Path, typer.Argument(help="A trace, or a folder of traces of one model, which are joined.")],
    calibration: CalibrationFile = None,
    machine: Annotated[str | None, typer.Option(help="One of the hardware table: rtx4090, l40s, h100-80g, ...")] = None,
    model_shape: Annotated[str | None, typer.Option(help="With --machine: olmoe, gpt-oss-20b, ...")] = None,
    experts: Annotated[str, typer.Option(help="With --machine: format of the experts.")] = "int4",
    cache: Annotated[
        str, typer.Option(help="Slots: shares like 25%, numbers of experts, or fits, all there is room for.")
    ] = "25%",
    policy: Annotated[str, typer.Option(help="Policies; belady knows the future.")] = "segment",
    predictor: Annotated[str, typer.Option(help="off, oracle, or auto, one of that recall and precision.")] = "off",
    recall: Annotated[float, typer.Option(help="Share of the routed experts that are foretold a layer ahead.")] = 0.85,
    precision: Annotated[float, typer.Option(help="Share of what is foretold that comes true.")] = 0.85,
    concurrency: Annotated[str, typer.Option(help="Requests at once.")] = "1",
    prefill_chunk: Annotated[int, typer.Option(min=1, help="Tokens of prompts in a step.")] = 512,
    link: Links = "own",
    host_memory: HostMemory = None,
    exclusive_tiers: ExclusiveTiers = False,
    requests: Annotated[str | None, typer.Option(metavar="A:B", help="Of each file, these requests only.")] = None,
    reshape: Annotated[
        bool, typer.Option("--reshape", help="With --machine: fold or spread another model's trace to the shape.")
    ] = False,
    json: Annotated[bool, typer.Option("--json", help="One JSON object a line.")] = False,
) -> None:
    """Tokens/s, stall and hit rate of a recorded routing on this machine or on one that is not here.

    Several values, separated by commas, of cache, policy, predictor, concurrency or link give a row each.
    """
    from engine.simulate import SimulationSettings
    from engine.simulate import simulate as simulate_trace

    costs = _costs(calibration, machine, model_shape, experts)
    routed = read_trace(trace, requests)
    if reshape:
        routed = _reshaped(costs, routed, model_shape)
    costs.check(routed)
    host_slots = _host_slots(costs, routed, host_memory)
    if not json:
        typer.echo(_title(costs, routed) + (", RESHAPED from another model's routing" if reshape else ""))
        typer.echo(_HEADER)
    for size, name, foretold, at_once, rate_text in product(
        _split(cache), _split(policy), _split(predictor), _split(concurrency), _split(link)
    ):
        settings = SimulationSettings(
            num_slots=_num_slots(costs, size, routed.num_keys),
            policy=name,
            predictor=foretold,
            concurrency=_number(at_once),
            prefill_chunk=prefill_chunk,
            link_bandwidth=None if rate_text == "own" else rate(rate_text),
            host_slots=host_slots,
            warm_host=not costs.is_measured,
            exclusive_tiers=exclusive_tiers,
            recall=recall,
            precision=precision,
        )
        result = simulate_trace(routed, costs, settings)
        typer.echo(msgspec.json.encode(result).decode() if json else _line(size, rate_text, result))


@grouped
def bench_simulate(
    *,
    weights: Weights,
    routing_skew: RoutingSkew = 0.5,
    memory: Annotated[str, typer.Option(help="Shares of the experts that have room.")] = "50%,25%",
    seqs: Annotated[str, typer.Option(help="Sequences at once.")] = "1,4,8",
    links: Annotated[str, typer.Option(help="Rates of the link from below; disk: as it is.")] = "disk,8GiB/s",
    predictors: Annotated[str, typer.Option(help="Predictors, off, and oracle, which knows.")] = "off,oracle",
    prompt_tokens: Annotated[int, typer.Option(min=1, help="In each prompt.")] = 64,
    output_tokens: Annotated[int, typer.Option(min=2, help="Of each sequence that are measured.")] = 32,
    calibration: CalibrationFile = None,
    json: Annotated[bool, typer.Option("--json", help="One JSON object a line.")] = False,
    formats: Formats,
    cache_policy: CachePolicy = "segment",
    packed_dir: PackedDir = None,
    threads: Threads = None,
    log_level: LogLevel = "error",
) -> None:
    """Calibrate, then compare the simulation with the engine on settings that it was not calibrated on."""
    start_logging(log_level)
    weights.check()
    from engine.bench import Workload
    from engine.bench_simulate import TOLERANCE
    from engine.bench_simulate import bench_simulate as validate
    from engine.calibration import load_calibration
    from server.progress import ProgressDisplay

    num_within = num_settings = 0
    with (
        _config(weights, formats, Tiers(cache_policy), Arithmetic(threads), packed_dir=packed_dir) as config,
        ProgressDisplay() as display,
    ):
        if not json:
            typer.echo(_BENCH_HEADER)
        for row in validate(
            config,
            random_shape=weights.random,
            num_layers=weights.layers,
            routing_skew=routing_skew,
            workload=Workload(prompt_tokens=prompt_tokens, output_tokens=output_tokens, temperature=1.0),
            memory_shares=[num_slots_of(text, 1_000_000) / 1_000_000 for text in _split(memory)],
            num_seqs=[_number(text) for text in _split(seqs)],
            links=[None if text == "disk" else rate(text) for text in _split(links)],
            predictors=_split(predictors),
            calibration=None if calibration is None else load_calibration(calibration),
            progress=display,
        ):
            num_settings += 1
            num_within += row.is_within
            typer.echo(msgspec.json.encode(row).decode() if json else _bench_line(row))
    if not json:
        typer.echo(f"{num_within} of {num_settings} within {TOLERANCE:.0%} of the measured speed")


@contextmanager
def _config(weights: Weights, *groups: Group, packed_dir: Path | None) -> Iterator[EngineConfig]:
    """Random weights have a place for their packed experts that is gone afterwards."""
    config = engine_config(weights.directory(), *groups, packed_dir=packed_dir)
    if weights.random is None:
        yield config
        return
    with tempfile.TemporaryDirectory(prefix="foregate-calibrate-") as scratch:
        yield replace(config, model=Path(scratch) / "random")


def _costs(file: Path | None, machine: str | None, model_shape: str | None, experts: str) -> Calibration:
    if (file is None) == (machine is None):
        raise typer.BadParameter("give --calibration FILE or --machine NAME", param_hint="--machine")
    if file is not None:
        from engine.calibration import load_calibration

        return load_calibration(file)
    from engine.hardware import calibration_of, hardware

    if model_shape is None:
        known = ", ".join(hardware().models)
        raise typer.BadParameter(f"needed with --machine; known: {known}", param_hint="--model-shape")
    assert machine is not None
    return calibration_of(machine, model_shape, experts)


def _host_slots(costs: Calibration, trace: RoutingTrace, host_memory: int | None) -> int:
    """A machine of the table has all experts in host memory unless said otherwise."""
    if host_memory is None:
        return 0 if costs.is_measured else trace.num_keys
    return min(trace.num_keys, host_memory // costs.record_nbytes)


def _reshaped(costs: Calibration, trace: RoutingTrace, model_shape: str | None) -> RoutingTrace:
    from cache.reshape import reshape
    from engine.hardware import hardware

    if costs.is_measured or model_shape is None:
        raise typer.BadParameter("only with --machine and --model-shape", param_hint="--reshape")
    return reshape(trace, costs.num_layers, costs.num_experts, hardware().models[model_shape].num_active)


def _num_slots(costs: Calibration, size: str, num_keys: int) -> int:
    room = None if costs.memory_nbytes is None else costs.memory_nbytes // costs.record_nbytes
    if size == "fits":
        if room is None:
            raise ConfigError("what fits is known of machines of the table only: give a share or a number")
        return min(room, num_keys)
    num_slots = num_slots_of(size, num_keys)
    if room is not None and num_slots > room:
        raise ConfigError(
            f"{num_slots} experts are {num_slots * costs.record_nbytes / _GIB:.1f} GiB, {costs.machine} has "
            f"{(costs.memory_nbytes or 0) / _GIB:.1f} GiB for them: {room} at most"
        )
    return num_slots


def _split(text: str) -> list[str]:
    return [part.strip() for part in text.split(",") if part.strip()]


def _number(text: str) -> int:
    if not text.isdigit() or int(text) < 1:
        raise ConfigError(f"{text!r} is not a number of requests")
    return int(text)


_HEADER = (
    f"{'cache':>7} {'policy':12} {'predictor':9} {'at once':>7} {'link':>9} {'tok/s':>8} {'step ms':>8} {'p99':>8} "
    f"{'stall':>6} {'hits':>6} {'MB/tok':>8} {'prefill tok/s':>13}"
)
_BENCH_HEADER = (
    f"{'memory':>6} {'seqs':>4} {'link':>8} {'predictor':9} {'predicted':>9} {'measured':>9} {'ratio':>6} "
    f"{'stall':>13} {'hits':>15}"
)


def _title(costs: Calibration, trace: RoutingTrace) -> str:
    origin = "measured costs" if costs.is_measured else "SIMULATED HARDWARE, costs from published figures"
    return (
        f"{costs.model}, {costs.experts_format} experts of {costs.record_nbytes / 1e6:.2f} MB, on {costs.machine} "
        f"({origin}): {trace.num_requests} requests, {trace.num_tokens} tokens"
    )


def _line(size: str, link: str, result: SimulationResult) -> str:
    settings, decode = result.settings, result.decode
    prefill = f"{result.prefill.tokens_per_s:.1f}" if result.prefill.num_steps else "-"
    return (
        f"{size:>7} {settings.policy:12} {settings.predictor:9} {settings.concurrency:7} {link:>9} "
        f"{result.output_tokens_per_s:8.1f} {decode.step_ms:8.2f} {decode.step_p99_ms:8.2f} {decode.stall_share:6.1%} "
        f"{decode.hit_rate:6.1%} {decode.read_mb_per_token:8.1f} {prefill:>13}"
    )


def _bench_line(row: Validation) -> str:
    link = "disk" if row.link_gib_per_s is None else f"{row.link_gib_per_s:g}GiB/s"
    stalls = f"{row.predicted_stall_share:6.1%}/{row.measured_stall_share:6.1%}"
    return (
        f"{row.memory_share:6.0%} {row.num_seqs:4} {link:>8} {row.predictor:9} {row.predicted_tokens_per_s:9.2f} "
        f"{row.measured_tokens_per_s:9.2f} {row.ratio:6.2f} {stalls} "
        f"{row.predicted_hit_rate:7.1%}/{row.measured_hit_rate:7.1%}"
    )


def register(app: Any, bench: Any) -> None:
    """Add the commands."""
    app.command()(calibrate)
    app.command()(simulate)
    bench.command("simulate")(bench_simulate)
