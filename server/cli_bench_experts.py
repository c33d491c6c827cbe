"""`foregate bench offload` and `bench predict`: what experts that are not in memory cost, and how many are foretold."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Annotated

import msgspec
import typer

from engine.config import SchedulerConfig
from server.cli_bench import RoutingSkew, app
from server.cli_engine import Arithmetic, Formats, Memory, Tiers, Weights, engine_config, grouped
from server.cli_options import (
    KV_MEMORY,
    CachePolicy,
    ExclusiveTiers,
    Experts,
    HostMemory,
    KvMemory,
    LinkBandwidth,
    LogLevel,
    Model,
    PackedDir,
    Predictor,
    TargetItl,
    Threads,
    directory_of,
    rate,
    start_logging,
)
from server.settings import Environment

__all__ = ["app"]  # with these commands added


@app.command()
@grouped
def offload(
    *,
    weights: Weights,
    routing_skew: RoutingSkew = 0.0,
    memory: Annotated[str, typer.Option(help="Shares of the experts that have room.")] = "50%,25%",
    links: Annotated[str, typer.Option(help="Rates of the link from below; disk: as it is.")] = "disk",
    predictors: Annotated[str, typer.Option(help="Predictors, off, and oracle, which knows.")] = "off,auto,oracle",
    seqs: Annotated[int, typer.Option(min=1, help="Sequences at once.")] = 1,
    turns: Annotated[int, typer.Option(min=1, help="That each setting takes; the medians are told.")] = 3,
    prompt_tokens: Annotated[int, typer.Option(min=1, help="In each prompt.")] = 64,
    output_tokens: Annotated[int, typer.Option(min=2, help="Of each sequence that are measured.")] = 48,
    temperature: Annotated[float, typer.Option(min=0.0, help="At 0 random weights repeat themselves.")] = 1.0,
    json: Annotated[bool, typer.Option("--json", help="One JSON object a line.")] = False,
    formats: Formats,
    cache_policy: CachePolicy = "segment",
    host_memory: HostMemory = None,
    exclusive_tiers: ExclusiveTiers = False,
    threads: Threads = None,
    log_level: LogLevel = "error",
) -> None:
    """Decode with some of the experts in memory: what waiting costs, by predictor, beside an oracle."""
    start_logging(log_level)
    weights.check()
    from engine.bench import Workload
    from engine.bench_offload import bench_offload
    from server.progress import ProgressDisplay

    tiers = Tiers(cache_policy, host_memory=host_memory, exclusive_tiers=exclusive_tiers)
    config = engine_config(weights.directory(), formats, tiers, Arithmetic(threads))
    with ProgressDisplay() as display:
        results = bench_offload(
            config,
            Workload(prompt_tokens=prompt_tokens, output_tokens=output_tokens, temperature=temperature),
            num_seqs=seqs,
            num_turns=turns,
            memory_shares=[_share(text) for text in memory.split(",")],
            links=[None if text == "disk" else rate(text) for text in links.split(",")],
            predictors=predictors.split(","),
            random_shape=weights.random,
            num_layers=weights.layers,
            routing_skew=routing_skew,
            progress=display,
        )
        if not json:
            typer.echo(
                f"{'memory':>6} {'link':>8} {'predictor':22} {'tok/s':>7} {'step ms':>8} {'resident':>8} {'link':>7} "
                f"{'bound':>6} {'stall ms/tok':>12} {'recovered':>9} {'hits':>6} {'MB/tok':>7} {'same':>5}"
            )
        for r in results:
            if json:
                typer.echo(msgspec.json.encode(r).decode())
                continue
            link = "disk" if r.link_gib_per_s is None else f"{r.link_gib_per_s:g}GiB/s"
            recovered = "" if r.recovered is None else f"{r.recovered:.0%}"
            typer.echo(
                f"{r.memory_share:6.0%} {link:>8} {r.predictor:22} {r.tokens_per_s:7.1f} {r.step_ms:8.1f} "
                f"{r.resident_step_ms:8.1f} {r.link_step_ms:7.1f} {r.of_bound:5.2f}x {r.stall_ms_per_token:12.2f} "
                f"{recovered:>9} {r.hit_rate:6.1%} {r.read_mb_per_token:7.1f} {'yes' if r.same_bits else 'NO':>5}"
            )


@app.command()
@grouped
def schedule(
    *,
    weights: Weights,
    routing_skew: RoutingSkew = 0.0,
    memory: Annotated[str, typer.Option(help="Shares of the experts that have room.")] = "50%,25%,12.5%",
    schedulers: Annotated[
        str, typer.Option(help="fcfs:16 runs 16 requests; expert-aware:64/16 runs 64, of them 16 in a step.")
    ] = "fcfs:16,expert-aware:64/16,expert-aware:64",
    requests: Annotated[int, typer.Option(min=1, help="All there from the start.")] = 64,
    prompt_tokens: Annotated[int, typer.Option(min=1, help="In each prompt, with random weights.")] = 64,
    output_tokens: Annotated[int, typer.Option(min=2, help="Of an answer, on average.")] = 48,
    temperature: Annotated[float, typer.Option(min=0.0, help="At 0 random weights repeat themselves.")] = 1.0,
    target_itl: TargetItl = None,
    json: Annotated[bool, typer.Option("--json", help="One JSON object a line.")] = False,
    html: Annotated[Path | None, typer.Option(help="Also draw throughput over latency, into this file.")] = None,
    formats: Formats,
    kv_memory: KvMemory = KV_MEMORY,
    cache_policy: CachePolicy = "segment",
    predictor: Predictor = "auto",
    link_bandwidth: LinkBandwidth = None,
    threads: Threads = None,
    log_level: LogLevel = "error",
) -> None:
    """The same mixed requests by each scheduler, with some of the experts in memory: tokens/s, bytes, latencies."""
    start_logging(log_level)
    weights.check()
    from engine.bench import Workload
    from engine.bench_schedule import Contender, bench_schedule
    from server.page import fill
    from server.progress import ProgressDisplay

    if html is not None:
        html.touch()  # a place that cannot be written to is told before hours of measuring

    tiers = Tiers(cache_policy, predictor, link_bandwidth=link_bandwidth)
    config = engine_config(weights.directory(), formats, Memory(kv_memory), tiers, Arithmetic(threads))
    config = replace(config, scheduler=SchedulerConfig(target_itl_s=target_itl))
    with ProgressDisplay() as display:
        results = bench_schedule(
            config,
            Workload(prompt_tokens=prompt_tokens, output_tokens=output_tokens, temperature=temperature),
            [Contender.parse(text) for text in schedulers.split(",")],
            num_requests=requests,
            memory_shares=[_share(text) for text in memory.split(",")],
            random_shape=weights.random,
            num_layers=weights.layers,
            routing_skew=routing_skew,
            progress=display,
        )
        if not json:
            typer.echo(
                f"{'memory':>6} {'scheduler':20} {'tok/s':>7} {'MB/tok':>7} {'ITL ms':>7} {'p99':>7} {'TTFT s':>7} "
                f"{'latency s':>9} {'p99':>6} {'same':>5}"
            )
        done = []
        for r in results:
            done.append(r)
            if json:
                typer.echo(msgspec.json.encode(r).decode())
                continue
            name = f"{r.scheduler}:{r.max_num_seqs}" + (
                f"/{r.max_step_seqs}" if r.max_step_seqs < r.max_num_seqs else ""
            )
            typer.echo(
                f"{r.memory_share:6.1%} {name:20} {r.tokens_per_s:7.1f} {r.read_mb_per_token:7.2f} "
                f"{r.itl_ms_mean:7.1f} {r.itl_ms_p99:7.1f} {r.ttft_s_mean:7.2f} "
                f"{r.latency_s_mean:9.2f} {r.latency_s_p99:6.2f} "
                f"{'yes' if r.same_tokens else 'NO':>5}"
            )
    if html is not None:
        title = f"Schedulers: {weights.random or weights.model}"
        shape = f"{requests} requests, all there from the start, {output_tokens} tokens an answer on average"
        html.write_text(fill("schedules.html", title, {"title": title, "shape": shape, "rows": done}), encoding="utf-8")


def _share(text: str) -> float:
    """'12.5%' -> 0.125. Raises `typer.BadParameter`."""
    try:
        share = float(text.strip().removesuffix("%")) / 100
    except ValueError:
        share = 0.0
    if not text.strip().endswith("%") or not 0.0 < share <= 1.0:
        raise typer.BadParameter(f"cannot read share {text!r}; write it like 50%", param_hint="--memory")
    return share


@app.command()
def predict(
    model: Model = "demo",
    prompts: Annotated[Path | None, typer.Option(help="A prompt a line [default: fifty of Foregate's].")] = None,
    output_tokens: Annotated[int, typer.Option(min=2, help="Of each answer at most.")] = 64,
    json: Annotated[bool, typer.Option("--json", help="One JSON object a line.")] = False,
    experts: Experts = "auto",
    packed_dir: PackedDir = None,
    threads: Threads = None,
    log_level: LogLevel = "warning",
) -> None:
    """How many of the routed experts each predictor foretells, when each may name as many as are routed."""
    start_logging(log_level)
    from engine.bench_prediction import bench_prediction
    from server.progress import ProgressDisplay

    directory = directory_of(model, Environment())
    config = engine_config(directory, Formats(experts=experts), Arithmetic(threads), packed_dir=packed_dir)
    texts = [] if prompts is None else list(filter(None, prompts.read_text(encoding="utf-8").splitlines()))
    with ProgressDisplay() as display:
        results = bench_prediction(config, prompts=texts, output_tokens=output_tokens, progress=display)
    if not json:
        distances = "".join(f"{distance:>3} ahead" for distance in results[0].ahead)
        typer.echo(f"{'predictor':12}{distances}  from tokens")
    for r in results:
        if json:
            typer.echo(msgspec.json.encode(r).decode())
            continue
        ahead = "".join(f"{recall:>9.1%}" for recall in r.ahead.values())
        typer.echo(f"{r.predictor:12}{ahead}  " + ("-" if r.from_tokens is None else f"{r.from_tokens:.1%}").rjust(11))
