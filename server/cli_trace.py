"""`foregate trace`: recording a running server's routing, and what recorded routing says of cache policies."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import msgspec
import typer

from engine.errors import ConfigError
from engine.messages import MAX_TRACE_TOKENS

if TYPE_CHECKING:
    from cache.replay import ReplayResult
    from cache.trace import RoutingTrace

app = typer.Typer(help="Record routing, and replay it.", no_args_is_help=True)


class Row(msgspec.Struct, frozen=True, kw_only=True):
    """One policy at one size. Rates and shares are fractions; a phase without queries has no rate."""

    policy: str
    cache: str
    num_slots: int
    hit_rate: float
    prefill_hit_rate: float | None
    decode_hit_rate: float | None
    share: float | None  # of the way from LRU to Belady; None where these are the same
    num_queries: int
    num_fetches: int
    us_per_call: float  # of a layer call, in the policy and the replay's books


@app.command()
def record(
    out: Annotated[Path, typer.Option(metavar="FILE", help="Where to write it, as .npz.")],
    url: Annotated[str, typer.Option(help="The server, with or without /v1.")] = "http://127.0.0.1:8000",
    seconds: Annotated[float, typer.Option(min=0.1, max=3600.0, help="For how long; Ctrl-C ends it before.")] = 60.0,
    max_tokens: Annotated[int | None, typer.Option(min=1, max=MAX_TRACE_TOKENS, help="Then it ends too.")] = None,
    domain: Annotated[str, typer.Option(metavar="NAME", help="What the workload is called in the trace.")] = "",
) -> None:
    """Record which experts a running server's tokens are routed to. FOREGATE_API_KEY is presented, if set."""
    from server.progress import ProgressDisplay
    from server.settings import Environment
    from server.trace_client import record_trace

    keys = Environment().api_keys
    with ProgressDisplay() as display:
        recorded = asyncio.run(
            record_trace(url, keys, out, seconds=seconds, domain=domain, max_tokens=max_tokens, progress=display)
        )
    full = ", where it was full" if recorded.is_full else ""
    typer.echo(f"{out}: {recorded.num_tokens} tokens of {recorded.num_requests} requests{full}")


@app.command()
def replay(
    file: Annotated[Path, typer.Argument(help="A trace, or a folder of traces of one model, which are joined.")],
    cache: Annotated[
        str, typer.Option(help="Sizes: shares of all experts like 12.5%, or numbers of experts.")
    ] = "12.5%,25%,50%",
    policy: Annotated[str, typer.Option(help="Policies; belady knows the future.")] = "segment,lru,lfu,belady",
    concurrency: Annotated[int, typer.Option(min=1, help="Requests at once, a token of each in a step.")] = 1,
    prefill_chunk: Annotated[int, typer.Option(min=1, help="Tokens of prompts in a step.")] = 512,
    requests: Annotated[str | None, typer.Option(metavar="A:B", help="Of each file, these requests only.")] = None,
    half: Annotated[str | None, typer.Option(help="first or second: that half of each file's requests.")] = None,
    every: Annotated[int, typer.Option(min=1, help="Of those, every so many only.")] = 1,
    json: Annotated[bool, typer.Option("--json", help="One JSON object a line.")] = False,
) -> None:
    """Hit rates of cache policies on a recorded routing, layer by layer as the engine runs, from an empty cache."""
    from cache.replay import REPLAY_POLICIES
    from cache.replay import replay as replay_trace

    policies = [name.strip() for name in policy.split(",") if name.strip()]
    for name in policies:
        if name not in REPLAY_POLICIES:
            raise ConfigError(f"unknown cache policy {name!r}; known: {', '.join(sorted(REPLAY_POLICIES))}")
    trace = read_trace(file, requests, half, every)
    sizes = [(text.strip(), num_slots_of(text, trace.num_keys)) for text in cache.split(",") if text.strip()]
    if not json:
        typer.echo(
            f"{file.name}: {trace.num_requests} requests, {trace.num_tokens} tokens, {len(trace.layers)} layers, "
            f"{trace.ids.shape[2]} of {trace.num_experts} experts a token"
        )
        typer.echo(f"{'policy':12} {'cache':>8} {'slots':>6} {'hit rate':>9} {'LRU->Belady':>12} {'us/call':>8}")
    for text, num_slots in sizes:
        done: dict[str, ReplayResult] = {}
        for name in dict.fromkeys(("lru", "belady", *policies)):
            done[name] = replay_trace(trace, name, num_slots, concurrency=concurrency, prefill_chunk=prefill_chunk)
        for name in policies:
            row = _row(done[name], text, done["lru"].hit_rate, done["belady"].hit_rate)
            typer.echo(msgspec.json.encode(row).decode() if json else _line(row))


def read_trace(path: Path, requests: str | None = None, half: str | None = None, every: int = 1) -> RoutingTrace:
    """A file, or a folder of them, with what was picked of each one's requests. Raises `ConfigError` if nothing is."""
    from cache.trace import concatenate, load_all

    if requests is not None and half is not None:
        raise ConfigError("--requests and --half exclude each other")
    if half not in (None, "first", "second"):
        raise ConfigError(f"--half is first or second, not {half!r}")
    traces = []
    for trace in load_all(path):
        middle = trace.num_requests // 2
        bounds = slice(middle) if half == "first" else slice(middle, None) if half else _range(requests)
        picked = range(trace.num_requests)[bounds][::every]
        traces += [trace.select(i, i + 1) for i in picked] or [trace.select(0, 0)]
    joined = concatenate(traces)
    if not joined.num_tokens:
        raise ConfigError(f"nothing of {path.name} is left: it has no tokens, or the requests picked have none")
    return joined


def _range(text: str | None) -> slice:
    """'3:10' -> slice(3, 10), either may be left out. Raises `ConfigError`."""
    first, colon, last = (text or ":").partition(":")
    try:
        if not colon:
            raise ValueError
        return slice(int(first or 0), int(last) if last else None)
    except ValueError:
        raise ConfigError(f"cannot read requests {text!r}; write them like 0:40") from None


def num_slots_of(text: str, num_keys: int) -> int:
    """'12.5%' of the experts, or that many. Raises `ConfigError`."""
    try:
        share = text.strip().removesuffix("%")
        num = round(float(share) / 100 * num_keys) if share != text.strip() else int(share)
    except (ValueError, OverflowError):
        raise ConfigError(f"cannot read cache size {text!r}; write it like 12.5% or 96") from None
    if not 0 < num <= num_keys:
        raise ConfigError(f"a cache of {text.strip()} is {num} experts of {num_keys}")
    return num


def _row(result: ReplayResult, text: str, lru: float, belady: float) -> Row:
    phases = [phase.hits / phase.queries if phase.queries else None for phase in (result.prefill, result.decode)]
    return Row(
        policy=result.policy,
        cache=text,
        num_slots=result.num_slots,
        hit_rate=result.hit_rate,
        prefill_hit_rate=phases[0],
        decode_hit_rate=phases[1],
        share=(result.hit_rate - lru) / (belady - lru) if belady > lru else None,
        num_queries=result.num_queries,
        num_fetches=result.num_fetches,
        us_per_call=1e6 * result.decision_s / result.num_calls,
    )


def _line(row: Row) -> str:
    share = "-" if row.share is None else f"{row.share:.1%}"
    return f"{row.policy:12} {row.cache:>8} {row.num_slots:>6} {row.hit_rate:>9.1%} {share:>12} {row.us_per_call:>8.1f}"
