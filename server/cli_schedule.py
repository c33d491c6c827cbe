"""`foregate trace schedule`: what batching by experts would have read less on recorded routing."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import msgspec
import typer

from engine.config import SchedulerConfig
from engine.errors import ConfigError
from server.cli_trace import num_slots_of, read_trace


class Row(msgspec.Struct, frozen=True, kw_only=True):
    """One size of cache and of steps. Records are experts read from the tier below."""

    cache: str
    num_slots: int
    step_seqs: int
    runnable: int
    fcfs_records_per_token: float
    expert_aware_records_per_token: float
    fewer: float  # share of the records that expert-aware batching does not read
    whole: bool  # to the last request; else while some waited, so that as many as may run did


def schedule(
    file: Annotated[Path, typer.Argument(help="A trace, or a folder of traces of one model, whose files take turns.")],
    cache: Annotated[str, typer.Option(help="Sizes: shares of all experts, or numbers of experts.")] = "12.5%,25%,50%",
    step_seqs: Annotated[str, typer.Option(help="Requests in one step.")] = "8,16",
    runnable: Annotated[int, typer.Option(min=1, help="Of how many they are chosen.")] = 64,
    quantum: Annotated[int, typer.Option(min=1, help="Steps for which a group stays.")] = SchedulerConfig().quantum,
    max_passed_over: Annotated[
        int, typer.Option(min=0, help="Turns in which a request may be left out.")
    ] = SchedulerConfig().max_passed_over,
    policy: Annotated[str, typer.Option(help="Which experts stay in memory.")] = "segment",
    requests: Annotated[str | None, typer.Option(metavar="A:B", help="Of each file, these requests only.")] = None,
    half: Annotated[str | None, typer.Option(help="first or second: that half of each file's requests.")] = None,
    json: Annotated[bool, typer.Option("--json", help="One JSON object a line.")] = False,
) -> None:
    """Steps of a fixed size: first come, first served, beside groups chosen by their experts."""
    from cache.trace import in_turns
    from engine.schedule_replay import replay_scheduled

    trace = in_turns(read_trace(file, requests, half))
    sizes = [(text.strip(), num_slots_of(text, trace.num_keys)) for text in cache.split(",") if text.strip()]
    if not json:
        typer.echo(f"{file.name}: {trace.num_requests} requests, {trace.num_tokens} tokens; records read a token")
        typer.echo(f"{'cache':>8} {'step':>5} {'of':>4} {'until':>8} {'fcfs':>8} {'expert-aware':>13} {'fewer':>7}")
    for text, num_slots in sizes:
        for step in map(_count, step_seqs.split(",")):
            fcfs = SchedulerConfig(policy="fcfs", max_num_seqs=step)
            aware = SchedulerConfig(
                policy="expert-aware",
                max_num_seqs=runnable,
                max_step_seqs=step,
                max_num_batched_tokens=max(512, runnable),
                quantum=quantum,
                max_passed_over=max_passed_over,
            )
            aware.check()
            for whole in (False, True):
                rates = []
                for config in (fcfs, aware):
                    result, num_tokens = replay_scheduled(trace, policy, num_slots, config, while_waiting=not whole)
                    if not num_tokens:
                        break
                    rates.append(result.num_fetches / num_tokens)
                if len(rates) < 2:  # none ever waits
                    continue
                row = Row(
                    cache=text,
                    num_slots=num_slots,
                    step_seqs=step,
                    runnable=runnable,
                    fcfs_records_per_token=rates[0],
                    expert_aware_records_per_token=rates[1],
                    fewer=1 - rates[1] / rates[0] if rates[0] else 0.0,
                    whole=whole,
                )
                typer.echo(msgspec.json.encode(row).decode() if json else _line(row))


def _count(text: str) -> int:
    try:
        num = int(text)
    except ValueError:
        num = 0
    if num < 1:
        raise ConfigError(f"cannot read {text!r} as a number of requests")
    return num


def _line(row: Row) -> str:
    until = "the end" if row.whole else "no wait"
    return (
        f"{row.cache:>8} {row.step_seqs:>5} {row.runnable:>4} {until:>8} {row.fcfs_records_per_token:>8.2f} "
        f"{row.expert_aware_records_per_token:>13.2f} {row.fewer:>7.1%}"
    )
