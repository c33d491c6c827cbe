"""What do cancelled requests leave behind? `python -m loadtest.cancel --url ...`

Sends requests that would make many tokens, hangs up on all of them at once, and measures how soon the server is at rest
and answers the next one.
"""

from __future__ import annotations

import asyncio
import re
import time
from typing import Annotated

import httpx
import msgspec
import typer

from server.remote import server_url

_HELD = ("num_requests_running", "num_requests_waiting", "kv_cache_blocks_used")
_REST_S = 30.0
_COUNTED_S = 5.0  # for those that the server had not begun to read


class CancelResult(msgspec.Struct, frozen=True, kw_only=True):
    num_requests: int
    num_refused: int  # the queue was full
    num_cancelled: int
    num_counted_499: int
    next_answer_s: float  # from the hanging up
    at_rest_s: float  # from the hanging up until nothing is running, waiting or held
    integrity_error: str | None
    ok: bool  # within 2 s and 1 s, every one counted, and the books add up


def main(
    url: Annotated[str, typer.Option(help="The server.")] = "http://127.0.0.1:8000",
    num_requests: Annotated[int, typer.Option("--requests", help="At once.")] = 200,
    max_tokens: Annotated[int, typer.Option(help="Of each; what the context holds if that is less.")] = 10_000,
    prompt_tokens: Annotated[int, typer.Option(help="Of each.")] = 16,
    after: Annotated[float, typer.Option(help="Seconds until all hang up.")] = 0.5,
) -> None:
    """Prints one JSON line; exit code 1 where something stayed."""
    result = asyncio.run(cancel(server_url(url), num_requests, max_tokens, prompt_tokens, after))
    typer.echo(msgspec.json.encode(result).decode())
    raise typer.Exit(0 if result.ok else 1)


async def cancel(url: str, num_requests: int, max_tokens: int, prompt_tokens: int, after_s: float) -> CancelResult:
    limits = httpx.Limits(max_connections=num_requests + 8)
    async with httpx.AsyncClient(base_url=url, timeout=60.0, limits=limits, trust_env=False) as client:
        model = (await client.get("/v1/models")).raise_for_status().json()["data"][0]
        room = model.get("max_model_len", max_tokens + prompt_tokens) - prompt_tokens
        body = {"max_tokens": min(max_tokens, room), "ignore_eos": True, "stream": True}
        counted = await _metric(client, r'foregate_requests_total\{.*code="499"')

        async def ask(number: int) -> int:
            prompt = [10 + (7 * number + i) % 200 for i in range(prompt_tokens)]
            async with client.stream("POST", "/v1/completions", json={**body, "prompt": prompt}) as response:
                async for _ in response.aiter_bytes():
                    pass
                return response.status_code

        tasks = [asyncio.ensure_future(ask(number)) for number in range(num_requests)]
        await asyncio.sleep(after_s)
        refused = sum(task.done() and task.result() == 503 for task in tasks)
        num_cancelled = sum(not task.done() for task in tasks)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        hung_up = time.monotonic()
        answer, at_rest_s = await asyncio.gather(_next_answer(client, hung_up), _rest(client, hung_up))
        before, counted = counted, 0.0
        while counted < num_cancelled and time.monotonic() - hung_up < _COUNTED_S:
            counted = await _metric(client, r'foregate_requests_total\{.*code="499"') - before
        error = (await client.get("/admin/integrity")).raise_for_status().json()["error"]
    return CancelResult(
        num_requests=num_requests,
        num_refused=refused,
        num_cancelled=num_cancelled,
        num_counted_499=int(counted),
        next_answer_s=round(answer, 2),
        at_rest_s=round(at_rest_s, 2),
        integrity_error=error,
        ok=answer <= 2.0 and at_rest_s <= 1.0 and counted == num_cancelled and error is None,
    )


async def _next_answer(client: httpx.AsyncClient, since: float) -> float:
    (await client.post("/v1/completions", json={"prompt": [11, 12, 13], "max_tokens": 1})).raise_for_status()
    return time.monotonic() - since


async def _rest(client: httpx.AsyncClient, since: float) -> float:
    while (elapsed := time.monotonic() - since) < _REST_S:
        text = (await client.get("/metrics")).text
        if not any(_sum(text, rf"foregate_{name}\{{") for name in _HELD):
            return time.monotonic() - since
        await asyncio.sleep(0.02)
    return elapsed


async def _metric(client: httpx.AsyncClient, pattern: str) -> float:
    return _sum((await client.get("/metrics")).text, pattern)


def _sum(text: str, pattern: str) -> float:
    return sum(float(line.rsplit(" ", 1)[1]) for line in text.splitlines() if re.match(pattern, line))


if __name__ == "__main__":
    typer.run(main)
