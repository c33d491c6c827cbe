"""Are probes answered while the engine has all it can do and long prompts arrive? `python -m loadtest.probes --url ...`

Saturates a running server with chats, sends it prompts of 1 MB all the while, and measures /health, /ready and /live
from a process of its own: what is measured is the server, not this script's event loop.
"""

from __future__ import annotations

import asyncio
import multiprocessing
import statistics
import time
from multiprocessing.synchronize import Event
from typing import Annotated

import httpx
import msgspec
import typer

from server.remote import server_url

PATHS = ("/health", "/ready", "/live")
_LIMIT_S = 0.05


class ProbeResult(msgspec.Struct, frozen=True, kw_only=True):
    seconds: float
    num_probes: int
    num_long_prompts: int
    p50_ms: float
    p99_ms: float
    max_ms: float
    alone_p99_ms: float  # before the load
    ok: bool  # the p99 is at most 50 ms


def main(
    url: Annotated[str, typer.Option(help="The server.")] = "http://127.0.0.1:8000",
    seconds: Annotated[float, typer.Option(help="Under load.")] = 20.0,
    concurrency: Annotated[int, typer.Option(help="Chats at once.")] = 32,
    prompt_nbytes: Annotated[int, typer.Option(help="Of the long prompts.")] = 1_000_000,
) -> None:
    """Prints one JSON line; exit code 1 where a probe's p99 is above 50 ms."""
    url = server_url(url)
    alone = probe(url, 3.0)
    context = multiprocessing.get_context("spawn")
    stop = context.Event()
    sent = context.Value("i", 0)
    load = context.Process(target=_load, args=(url, concurrency, prompt_nbytes, stop, sent), daemon=True)
    load.start()
    time.sleep(3.0)
    sent.value = 0
    times = probe(url, seconds)
    num_long = sent.value
    stop.set()
    load.join(30)
    p99 = _p99(times)
    result = ProbeResult(
        seconds=seconds,
        num_probes=len(times),
        num_long_prompts=num_long,
        p50_ms=round(1e3 * statistics.median(times), 1),
        p99_ms=round(1e3 * p99, 1),
        max_ms=round(1e3 * max(times), 1),
        alone_p99_ms=round(1e3 * _p99(alone), 1),
        ok=p99 <= _LIMIT_S,
    )
    typer.echo(msgspec.json.encode(result).decode())
    raise typer.Exit(0 if result.ok else 1)


def probe(url: str, seconds: float) -> list[float]:
    """Seconds that each answer took, a new probe every 10 ms at most."""
    times: list[float] = []
    end = time.perf_counter() + seconds
    with httpx.Client(base_url=url, timeout=10.0, trust_env=False) as client:
        while (began := time.perf_counter()) < end:
            client.get(PATHS[len(times) % len(PATHS)]).raise_for_status()
            times.append(time.perf_counter() - began)
            time.sleep(0.01)
    return times


def _p99(times: list[float]) -> float:
    return sorted(times)[int(0.99 * (len(times) - 1))]


def _load(url: str, concurrency: int, prompt_nbytes: int, stop: Event, sent: object) -> None:
    asyncio.run(_run_load(url, concurrency, "many words and more " * (prompt_nbytes // 20), stop, sent))


async def _run_load(url: str, concurrency: int, prompt: str, stop: Event, sent: object) -> None:
    limits = httpx.Limits(max_connections=concurrency + 1)
    async with httpx.AsyncClient(base_url=url, timeout=120.0, limits=limits, trust_env=False) as client:

        async def chat(number: int) -> None:
            while True:
                messages = [{"role": "user", "content": f"Tell me story number {number}."}]
                await client.post("/v1/chat/completions", json={"messages": messages, "max_tokens": 64})

        async def long() -> None:
            while True:
                await client.post("/v1/completions", json={"prompt": prompt, "max_tokens": 1})  # refused or served
                sent.value += 1  # type: ignore[attr-defined]

        tasks = [asyncio.ensure_future(chat(number)) for number in range(concurrency)]
        tasks.append(asyncio.ensure_future(long()))
        while not stop.is_set():
            await asyncio.sleep(0.1)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


if __name__ == "__main__":
    typer.run(main)
