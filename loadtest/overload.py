"""What does ten times the load do? `python -m loadtest.overload --url ...`

Measures what a server can do with as many users as it runs at once, each asking again when it has its answer; then
sends ten times as many requests a second as that, whether others have been answered or not: those it takes must be
served as fast, the others refused at once, and memory must stay as it is. Both take turns, since a machine is not as
fast all the time: what counts is the median of the turns, each beside the mean of what came before and after it.
"""

from __future__ import annotations

import asyncio
import random
import statistics
import time
from pathlib import Path
from typing import Annotated

import msgspec
import typer

from loadtest.light_client import Exchange, LightClient
from server.remote import server_url

_REFUSED_S = 0.05
_SHARE = 0.95
_FILL_S = 4.0  # until the queue is full and the load is steady


class OverloadResult(msgspec.Struct, frozen=True, kw_only=True):
    concurrency: int  # of the users by whom the capacity is measured
    capacity_tokens_per_s: list[float]  # before, between and after the turns
    offered_per_s: float  # requests a second, in the first turn
    num_served: int
    num_refused: int
    num_failed: int
    goodput_tokens_per_s: list[float]  # of requests that were served, in each turn
    goodput_share: float  # of the capacity, median of the turns
    rejection_p50_ms: float
    rejection_p99_ms: float
    rss_mb: list[float]  # of the server and its children before and after each turn; empty without --pid
    ok: bool  # rejections within 50 ms (p99), 95 % of the capacity, nothing failed


class _Tally:
    """Of answers while `counting`."""

    def __init__(self) -> None:
        self.counting = False
        self.num_tokens = self.num_served = self.num_failed = 0
        self.rejections: list[float] = []

    async def ask(self, client: LightClient, request: bytes) -> None:
        try:
            sent = await client.exchange(request)
            try:
                await self._read(sent)
            finally:
                sent.close()
        except (OSError, EOFError):
            self.num_failed += 1

    async def _read(self, sent: Exchange) -> None:
        """Tokens are counted as they come: one for each of the stream's events that has text."""
        status = await sent.status()
        if status != 200:
            if status != 503:
                self.num_failed += 1
            elif self.counting:
                self.rejections.append(time.perf_counter() - sent.began)
            await sent.skip()
            return
        end = b""
        async for piece in sent.pieces():
            self.num_tokens += (piece.count(b'"text":"') - piece.count(b'"text":""')) * self.counting
            end = (end + piece)[-64:]
        is_done = b"data: [DONE]" in end
        self.num_served += is_done and self.counting
        self.num_failed += not is_done


def main(
    url: Annotated[str, typer.Option(help="The server.")] = "http://127.0.0.1:8000",
    seconds: Annotated[float, typer.Option(help="Of each part, measured.")] = 6.0,
    turns: Annotated[int, typer.Option(help="Under the load.")] = 15,
    concurrency: Annotated[int, typer.Option(help="What it runs at once.")] = 32,
    times: Annotated[float, typer.Option(help="Its capacity, as load.")] = 10.0,
    output_tokens: Annotated[int, typer.Option(help="Of each answer; the shorter, the more requests.")] = 128,
    pid: Annotated[int | None, typer.Option(help="The server's, for its memory.")] = None,
) -> None:
    """Prints one JSON line; exit code 1 where it does not hold."""
    result = asyncio.run(overload(server_url(url), seconds, turns, concurrency, times, output_tokens, pid))
    typer.echo(msgspec.json.encode(result).decode())
    raise typer.Exit(0 if result.ok else 1)


async def overload(
    url: str, seconds: float, turns: int, concurrency: int, times: float, output_tokens: int, pid: int | None
) -> OverloadResult:
    """See above."""
    client = LightClient(url)
    normal = [await _closed(client, concurrency, seconds, output_tokens)]
    heavy: list[_Tally] = []
    rss = [] if pid is None else [_rss_mb(pid)]
    offered = times * normal[0].num_tokens / seconds / output_tokens
    for _ in range(turns):
        heavy.append(
            await _open(client, times * normal[-1].num_tokens / seconds / output_tokens, seconds, output_tokens)
        )
        rss += [] if pid is None else [_rss_mb(pid)]
        normal.append(await _closed(client, concurrency, seconds, output_tokens))
    await client.close()
    shares = [
        2 * under.num_tokens / max(1, before.num_tokens + after.num_tokens)
        for before, under, after in zip(normal, heavy, normal[1:], strict=False)
    ]
    share = statistics.median(shares)
    num_failed = sum(one.num_failed for one in normal + heavy)
    waits = sorted(wait for one in heavy for wait in one.rejections) or [0.0]
    p99 = waits[int(0.99 * (len(waits) - 1))]
    return OverloadResult(
        concurrency=concurrency,
        capacity_tokens_per_s=[round(one.num_tokens / seconds, 1) for one in normal],
        offered_per_s=round(offered, 1),
        num_served=sum(one.num_served for one in heavy),
        num_refused=sum(len(one.rejections) for one in heavy),
        num_failed=num_failed,
        goodput_tokens_per_s=[round(one.num_tokens / seconds, 1) for one in heavy],
        goodput_share=round(share, 3),
        rejection_p50_ms=round(1e3 * waits[len(waits) // 2], 1),
        rejection_p99_ms=round(1e3 * p99, 1),
        rss_mb=rss,
        ok=p99 <= _REFUSED_S and share >= _SHARE and num_failed == 0,
    )


def _request(client: LightClient, number: int, output_tokens: int) -> bytes:
    prompt = f"Tell me story number {number}."
    body = {"prompt": prompt, "max_tokens": output_tokens, "ignore_eos": True, "stream": True}
    return client.request("/v1/completions", body)


async def _closed(client: LightClient, num_users: int, seconds: float, output_tokens: int) -> _Tally:
    """Each user asks again when it has its answer."""
    tally = _Tally()

    async def user(number: int) -> None:
        await asyncio.sleep(number / num_users)  # not all at one instant
        while True:
            await tally.ask(client, _request(client, number, output_tokens))

    tasks = [asyncio.ensure_future(user(number)) for number in range(num_users)]
    await _count(tally, seconds)
    await _end(tasks)
    return tally


async def _open(client: LightClient, per_second: float, seconds: float, output_tokens: int) -> _Tally:
    """Requests come when they are due, by a Poisson process."""
    tally = _Tally()
    rng = random.Random(0)
    tasks: set[asyncio.Task[None]] = set()

    async def arrive() -> None:
        due = time.perf_counter()
        number = 0
        while True:
            due += rng.expovariate(per_second)
            await asyncio.sleep(max(0.0, due - time.perf_counter()))
            number += 1
            task = asyncio.ensure_future(tally.ask(client, _request(client, number, output_tokens)))
            tasks.add(task)
            task.add_done_callback(tasks.discard)

    arriving = asyncio.ensure_future(arrive())
    await _count(tally, seconds)
    arriving.cancel()
    await _end([arriving, *tasks])
    return tally


async def _count(tally: _Tally, seconds: float) -> None:
    await asyncio.sleep(min(_FILL_S, seconds))
    tally.counting = True
    await asyncio.sleep(seconds)
    tally.counting = False


async def _end(tasks: list[asyncio.Task[None]]) -> None:
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    await asyncio.sleep(1.0)


def _rss_mb(pid: int) -> float:
    """Of a process and its children; what they share is counted once for each."""
    family = [pid, *map(int, Path(f"/proc/{pid}/task/{pid}/children").read_text().split())]
    pages = sum(int(Path(f"/proc/{one}/statm").read_text().split()[1]) for one in family)
    return round(pages * 4096 / 1e6, 1)


if __name__ == "__main__":
    typer.run(main)
