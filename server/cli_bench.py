"""`foregate bench`: measuring speed."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import AsyncGenerator
from contextlib import aclosing
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import msgspec
import typer

from engine.errors import ConfigError
from server.cli_engine import Arithmetic, Formats, Memory, Tiers, Weights, engine_config, grouped
from server.cli_options import (
    TOKEN_IDS,
    LogLevel,
    Model,
    PackedDir,
    TokenIds,
    directory_of,
    start_logging,
)
from server.settings import Environment

if TYPE_CHECKING:
    from server.bench import ServingResult

_HEADER = (
    f"{'':23} {'':7} {'output':>8}  {'first token, ms':^26}  {'between tokens, ms':^23}  {'answer, s':>12}\n"
    f"{'at once':>7} {'requests':>8} {'errors':>6} {'wall s':>7} {'tok/s':>8}  "
    f"{'mean':>8} {'p50':>8} {'p99':>8}  {'mean':>7} {'p50':>7} {'p99':>7}  {'p50':>7} {'p99':>7}"
)

RoutingSkew = Annotated[
    float, typer.Option(min=0.0, help="With --random: spread of the experts' popularity, in spreads of a logit.")
]

app = typer.Typer(help="Measure speed.", no_args_is_help=True)


@app.callback()
def _group() -> None:
    """Measure speed."""


@app.command()
@grouped
def offline(
    *,
    weights: Weights,
    routing_skew: RoutingSkew = 0.0,
    seqs: Annotated[str, typer.Option(help="Numbers of sequences at once.")] = "1,2,4,8,16,32",
    prompt_tokens: Annotated[int, typer.Option(min=1, help="In each prompt.")] = 128,
    output_tokens: Annotated[int, typer.Option(min=2, help="Of each sequence.")] = 64,
    temperature: Annotated[float, typer.Option(min=0.0, help="Above 0 random weights do not repeat themselves.")] = 0.0,
    json: Annotated[bool, typer.Option("--json", help="One JSON object a line.")] = False,
    formats: Formats,
    memory: Memory,
    tiers: Tiers,
    arithmetic: Arithmetic,
    log_level: LogLevel = "warning",
) -> None:
    """Prefill and decode tokens per second of the engine alone, without HTTP."""
    start_logging(log_level)
    weights.check()
    from engine.bench import Workload, bench_offline
    from server.progress import ProgressDisplay

    config = engine_config(weights.directory(), formats, memory, tiers, arithmetic)
    workload = Workload(prompt_tokens=prompt_tokens, output_tokens=output_tokens, temperature=temperature)
    results = bench_offline(
        config,
        workload,
        random_shape=weights.random,
        num_layers=weights.layers,
        routing_skew=routing_skew,
        batch_sizes=_numbers("--seqs", seqs),
        progress=ProgressDisplay(),
    )
    if not json:
        typer.echo(
            f"{'seqs':>4} {'prefill tok/s':>14} {'decode tok/s':>13} {'step ms':>8} {'outside':>8} "
            f"{'stall':>6} {'hits':>6} {'MB/tok':>7} {'of reading':>10}"
        )
    for r in results:
        if json:
            typer.echo(msgspec.json.encode(r).decode())
        else:
            typer.echo(
                f"{r.num_seqs:4} {r.prefill_tokens_per_s:14.1f} {r.decode_tokens_per_s:13.1f} {r.decode_step_ms:8.1f} "
                f"{r.outside_kernels:8.1%} {r.stall:6.1%} {r.hit_rate:6.1%} {r.read_mb_per_token:7.1f} "
                + (f"{r.of_reading_once:10.1%}" if r.of_reading_once is not None else f"{'':10}")
            )


@app.command()
@grouped
def perplexity(
    *,
    model: Model = "demo",
    text: Annotated[
        list[Path] | None, typer.Option(help="A text file; again for more [default: the topics of Python's help()]")
    ] = None,
    window: Annotated[int, typer.Option(min=2, help="Tokens that are scored together.")] = 512,
    max_windows: Annotated[int | None, typer.Option(min=1, help="So many, spread over the text [default: all]")] = None,
    json: Annotated[bool, typer.Option("--json", help="A JSON object.")] = False,
    formats: Formats,
    memory: Memory,
    packed_dir: PackedDir = None,
    arithmetic: Arithmetic,
    log_level: LogLevel = "warning",
) -> None:
    """How well MODEL predicts text: what a format costs in quality."""
    start_logging(log_level)
    from engine.perplexity import bench_perplexity
    from server.progress import ProgressDisplay

    config = engine_config(directory_of(model, Environment()), formats, memory, arithmetic, packed_dir=packed_dir)
    with ProgressDisplay() as progress:
        r = bench_perplexity(config, text or [], window=window, max_windows=max_windows, progress=progress)
    if json:
        typer.echo(msgspec.json.encode(r).decode())
    else:
        typer.echo(f"perplexity {r.perplexity:.4f} over {r.num_tokens} tokens in {r.num_windows} windows")


@app.command()
def serve(
    url: Annotated[str, typer.Option(help="The server, with or without /v1.")] = "http://127.0.0.1:8000",
    model: Annotated[str | None, typer.Option(help="Its name in the API [default: the first of /v1/models]")] = None,
    concurrency: Annotated[str, typer.Option(help="Numbers of requests at once.")] = "1,8,32",
    prompt_tokens: Annotated[int, typer.Option(min=1, help="In each prompt.")] = 137,
    output_tokens: Annotated[int, typer.Option(min=2, help="Of each answer.")] = 64,
    num_requests: Annotated[
        int | None, typer.Option(min=1, help="At each concurrency [default: three times that, at least 4]")
    ] = None,
    token_ids: TokenIds = TOKEN_IDS,
    seed: Annotated[int | None, typer.Option(help="Of the prompts [default: others each time]")] = None,
    api_key: Annotated[str | None, typer.Option(help="What to present [default: FOREGATE_API_KEY]")] = None,
    timeout: Annotated[float, typer.Option(min=0.001, help="Seconds that a request may take.")] = 600.0,
    json: Annotated[bool, typer.Option("--json", help="One JSON object a line.")] = False,
    log_level: LogLevel = "warning",
) -> None:
    """Tokens per second and latencies of a running server, ours or another with OpenAI's API."""
    start_logging(log_level)
    from server.bench import Workload, bench_server

    levels = [(at_once, num_requests or max(4, 3 * at_once)) for at_once in _numbers("--concurrency", concurrency)]
    if num_requests is not None and num_requests < max(levels)[0]:
        raise ConfigError(f"--num-requests {num_requests} cannot keep {max(levels)[0]} busy; raise it to that at least")
    workload = Workload(
        prompt_tokens=prompt_tokens, output_tokens=output_tokens, token_ids=token_ids, timeout_s=timeout
    )
    keys = Environment().api_keys if api_key is None else [api_key]
    results = bench_server(url, workload, levels, model=model, keys=keys, seed=seed)
    if not asyncio.run(_tell(results, json=json)):
        raise typer.Exit(1)


async def _tell(results: AsyncGenerator[ServingResult, None], *, json: bool) -> bool:
    """Print results as they come, and on stderr what spoils them; False if any request failed."""
    header = None if json else _HEADER
    all_well = True
    async with aclosing(results):
        async for r in results:
            if header is not None:
                typer.echo(header)
                header = None
            typer.echo(msgspec.json.encode(r).decode() if json else _row(r))
            if r.num_errors:
                all_well = False
                reasons = "; ".join(f"{times} x {reason}" for reason, times in Counter(r.errors).most_common(3))
                typer.echo(f"error: {r.num_errors} of {r.num_requests} requests failed: {reasons}", err=True)
            if r.num_cached_tokens:
                typer.echo(
                    f"warning: the server had {r.num_cached_tokens} prompt tokens in its cache; take another --seed",
                    err=True,
                )
    return all_well


def _row(r: ServingResult) -> str:
    first, between, whole = r.ttft_s, r.inter_token_s, r.latency_s
    return (
        f"{r.concurrency:7} {r.num_requests:8} {r.num_errors:6} {r.wall_s:7.1f} {r.output_tokens_per_s:8.1f}  "
        f"{first.mean * 1e3:8.1f} {first.p50 * 1e3:8.1f} {first.p99 * 1e3:8.1f}  "
        f"{between.mean * 1e3:7.1f} {between.p50 * 1e3:7.1f} {between.p99 * 1e3:7.1f}  "
        f"{whole.p50:7.2f} {whole.p99:7.2f}"
    )


def _numbers(option: str, text: str) -> list[int]:
    try:
        numbers = [int(part) for part in text.split(",")]
    except ValueError:
        numbers = []
    if not numbers or min(numbers) < 1:
        raise ConfigError(f"{option} {text!r} is not a list of numbers; write it like 1,8,32")
    return numbers
