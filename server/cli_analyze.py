"""`foregate analyze`: what a recorded workload asks of a cache."""

from __future__ import annotations

import math
import os
from pathlib import Path
from typing import Annotated

import msgspec
import typer

from engine.errors import ConfigError
from server.cli_options import ExpertSize, LogLevel, start_logging
from server.cli_trace import num_slots_of, read_trace

_SHARES = (0.06, 0.125, 0.25, 0.375, 0.5, 0.75)  # of all experts, replayed by default


def analyze(
    file: Annotated[
        Path, typer.Argument(metavar="TRACE", help="A trace, or a folder of traces of one model, which are joined.")
    ],
    window: Annotated[int, typer.Option(min=1, help="Tokens in a row that SRP and SCH look at.")] = 16,
    ratios: Annotated[str, typer.Option(help="SCH's caches, in multiples of one token's experts.")] = "1,1.5,2",
    cache: Annotated[
        str | None,
        typer.Option(help="Sizes to replay: shares of all experts like 12.5%, or numbers [default: 6% to 75%]."),
    ] = None,
    concurrency: Annotated[int, typer.Option(min=1, help="Requests at once, a token of each in a step.")] = 1,
    replay_tokens: Annotated[
        int | None,
        typer.Option(min=1, help="Replay so many, of whole requests [default: 30,000 layer calls' worth]."),
    ] = None,
    expert_size: ExpertSize = None,
    seed: Annotated[int, typer.Option(min=0, help="Of the batches that are drawn.")] = 0,
    html: Annotated[Path | None, typer.Option(help="Write a page with plots, complete in one file.")] = None,
    json: Annotated[bool, typer.Option("--json", help="One JSON object.")] = False,
    log_level: LogLevel = "warning",
) -> None:
    """Tell how local a recorded workload's routing is, what it uses, and how large a cache it deserves."""
    start_logging(log_level)
    from cache.measure import measure
    from server.analysis_page import page
    from server.analysis_text import Analysis, advice, text
    from server.progress import ProgressDisplay

    wanted = _ratios(ratios)
    if html is not None:
        _check_writable(html)
    trace = read_trace(file)
    if cache is None:
        sizes = [max(1, round(share * trace.num_keys)) for share in _SHARES]
    else:
        sizes = [num_slots_of(size, trace.num_keys) for size in cache.split(",") if size.strip()]
    if not sizes:
        raise ConfigError("no cache size to replay; write them like 12.5%,25%")
    longest = int((trace.seq_off[1:] - trace.seq_off[:-1]).max())
    if longest < window:
        raise ConfigError(f"the longest request of {file.name} has {longest} tokens, a window has {window}: lower it")
    num_running = int((trace.seq_off[1:] > trace.seq_off[:-1]).sum())
    if concurrency > num_running:
        raise ConfigError(f"{file.name} has {num_running} requests, so {concurrency} cannot run at once")
    with ProgressDisplay() as display:
        workload = measure(
            trace,
            window=window,
            ratios=wanted,
            sizes=sizes,
            replay_tokens=replay_tokens,
            concurrency=concurrency,
            seed=seed,
            progress=display,
        )
    done = Analysis(
        trace=file.resolve().name,
        expert_nbytes=expert_size,
        advice=advice(workload, expert_size),
        workload=workload,
    )
    if html is not None:
        html.write_text(page(done), encoding="utf-8")
    typer.echo(msgspec.json.encode(done).decode() if json else text(done))


def _ratios(text: str) -> list[float]:
    """'1,1.5' -> [1.0, 1.5]. Raises `ConfigError`."""
    try:
        ratios = [float(part) for part in text.split(",") if part.strip()]
    except ValueError:
        ratios = []
    if not ratios or not all(0 < ratio < math.inf for ratio in ratios):
        raise ConfigError(f"cannot read ratios {text!r}; write them like 1,1.5,2")
    return list(dict.fromkeys(ratios))


def _check_writable(path: Path) -> None:
    """Raises `ConfigError`: a minute's work is not for nothing."""
    if path.is_dir():
        raise ConfigError(f"cannot write {path}: it is a directory")
    if not path.parent.is_dir():
        raise ConfigError(f"cannot write {path}: there is no directory {path.parent}")
    if not os.access(path if path.exists() else path.parent, os.W_OK):
        raise ConfigError(f"cannot write {path}: permission denied")
