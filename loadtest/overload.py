"""What does ten times the load do? `python -m loadtest.overload --url ...`

First measures what a server can do with as many users as it runs at once, then sends ten times as many requests as it
takes, for as long: those it takes must be served as fast, the others refused at once, and memory must stay as it is.
"""

from __future__ import annotations

import asyncio
import time
from pathlib import Path
from typing import Annotated

import httpx
import msgspec
import typer

from server.remote import server_url


class OverloadResult(msgspec.Struct, frozen=True, kw_only=True):
    concurrency: int  # of the first part
    capacity_tokens_per_s: float
    overload: int  # requests at once in the second part
    num_served: int
    num_refused: int
    num_failed: int
    goodput_tokens_per_s: float  # of requests that were served
    goodput_share: float  # of the capacity
    rejection_p50_ms: float
    rejection_p99_ms: float
    rss_mb: list[float]  # of the server and its children before and after; empty without --pid
    ok: bool  # rejections within 50 ms (p99), 95 % of the capacity, nothing failed


class _Tally:
    def __init__(self) -> None:
        self.tokens = 0
        self.num_served = self.num_failed = 0
        self.rejections: list[float] = []


def main(
    url: Annotated[str, typer.Option(help="The server.")] = "http://127.0.0.1:8000",
    seconds: Annotated[float, typer.Option(help="Of each part.")] = 20.0,
    concurrency: Annotated[int, typer.Option(help="What it runs at once.")] = 32,
    times: Annotated[int, typer.Option(help="As many at once in the second part.")] = 10,
    output_tokens: Annotated[int, typer.Option(help="Of each answer.")] = 32,
    pid: Annotated[int | None, typer.Option(help="The server's, for its memory.")] = None,
) -> None:
    """Prints one JSON line; exit code 1 where it does not hold."""
    result = asyncio.run(overload(server_url(url), seconds, concurrency, times, output_tokens, pid))
    typer.echo(msgspec.json.encode(result).decode())
    raise typer.Exit(0 if result.ok else 1)


async def overload(
    url: str, seconds: float, concurrency: int, times: int, output_tokens: int, pid: int | None
) -> OverloadResult:
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=None)
    async with httpx.AsyncClient(base_url=url, timeout=300.0, limits=limits, trust_env=False) as client:
        await _users(client, concurrency, min(5.0, seconds), output_tokens)  # warm
        before = [] if pid is None else [_rss_mb(pid)]
        normal = await _users(client, concurrency, seconds, output_tokens)
        heavy = await _users(client, concurrency * times, seconds, output_tokens)
        after = [] if pid is None else [_rss_mb(pid)]
    capacity, goodput = normal.tokens / seconds, heavy.tokens / seconds
    waits = sorted(heavy.rejections) or [0.0]
    p99 = waits[int(0.99 * (len(waits) - 1))]
    return OverloadResult(
        concurrency=concurrency,
        capacity_tokens_per_s=round(capacity, 1),
        overload=concurrency * times,
        num_served=heavy.num_served,
        num_refused=len(heavy.rejections),
        num_failed=heavy.num_failed,
        goodput_tokens_per_s=round(goodput, 1),
        goodput_share=round(goodput / capacity, 3) if capacity else 0.0,
        rejection_p50_ms=round(1e3 * waits[len(waits) // 2], 1),
        rejection_p99_ms=round(1e3 * p99, 1),
        rss_mb=[*before, *after],
        ok=p99 <= 0.05 and goodput >= 0.95 * capacity and heavy.num_failed == 0,
    )


async def _users(client: httpx.AsyncClient, num_users: int, seconds: float, output_tokens: int) -> _Tally:
    """Each asks again when it has its answer, or a second after it was refused. Tokens are counted as they come."""
    tally = _Tally()

    async def user(number: int) -> None:
        await asyncio.sleep(number / num_users)  # not all at one instant
        while True:
            messages = [{"role": "user", "content": f"Tell me story number {number}."}]
            body = {"messages": messages, "max_tokens": output_tokens, "ignore_eos": True, "stream": True}
            began = time.perf_counter()
            async with client.stream("POST", "/v1/chat/completions", json=body) as response:
                if response.status_code == 503:
                    tally.rejections.append(time.perf_counter() - began)
                else:
                    last = ""
                    async for line in response.aiter_lines():
                        tally.tokens += '"content":"' in line
                        last = line or last
                    is_done = last == "data: [DONE]" and response.status_code == 200
                    tally.num_served += is_done
                    tally.num_failed += not is_done
                    continue
            await asyncio.sleep(1.0)

    tasks = [asyncio.ensure_future(user(number)) for number in range(num_users)]
    await asyncio.sleep(seconds)
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    await asyncio.sleep(1.0)
    return tally


def _rss_mb(pid: int) -> float:
    """Of a process and its children."""
    family = [pid, *map(int, Path(f"/proc/{pid}/task/{pid}/children").read_text().split())]
    pages = sum(int(Path(f"/proc/{one}/statm").read_text().split()[1]) for one in family)
    return round(pages * 4096 / 1e6, 1)


if __name__ == "__main__":
    typer.run(main)
