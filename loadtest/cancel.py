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

from loadtest.light_client import Exchange, LightClient
from server.remote import server_url

_HELD = ("num_requests_running", "num_requests_waiting", "kv_cache_blocks_used")
_REST_S = 30.0
_COUNTED_S = 5.0  # for the counter to be scraped with all of them


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
    async with httpx.AsyncClient(base_url=url, timeout=60.0, trust_env=False) as client:
        model = (await client.get("/v1/models")).raise_for_status().json()["data"][0]
        room = model.get("max_model_len", max_tokens + prompt_tokens) - prompt_tokens
        body = {"max_tokens": min(max_tokens, room), "ignore_eos": True, "stream": True}
        counted = await _metric(client, r'foregate_requests_total\{.*code="499"')

        light = LightClient(url)

        async def send(number: int) -> Exchange:
            prompt = [10 + (7 * number + i) % 200 for i in range(prompt_tokens)]
            return await light.exchange(light.request("/v1/completions", {**body, "prompt": prompt}))

        sent = await asyncio.gather(*map(send, range(num_requests)))
        answers = [asyncio.ensure_future(one.status()) for one in sent]
        await asyncio.sleep(after_s)
        refused = sum(answer.done() and answer.result() == 503 for answer in answers)
        num_cancelled = num_requests - refused
        hung_up = time.monotonic()
        for answer in answers:
            answer.cancel()
        for one in sent:
            one.close()
        next_answer_s, at_rest_s = await asyncio.gather(_next_answer(client, hung_up), _rest(client, hung_up))
        before, counted = counted, 0.0
        while counted < num_cancelled and time.monotonic() - hung_up < _COUNTED_S:
            counted = await _metric(client, r'foregate_requests_total\{.*code="499"') - before
        error = (await client.get("/admin/integrity")).raise_for_status().json()["error"]
    return CancelResult(
        num_requests=num_requests,
        num_refused=refused,
        num_cancelled=num_cancelled,
        num_counted_499=int(counted),
        next_answer_s=round(next_answer_s, 2),
        at_rest_s=round(at_rest_s, 2),
        integrity_error=error,
        ok=next_answer_s <= 2.0 and at_rest_s <= 1.0 and counted == num_cancelled and error is None,
    )


async def _next_answer(client: httpx.AsyncClient, since: float) -> float:
    """A server that has not seen all of them hang up yet may still refuse one."""
    while True:
        answer = await client.post("/v1/completions", json={"prompt": [11, 12, 13], "max_tokens": 1})
        if answer.status_code != 503:
            answer.raise_for_status()
            return time.monotonic() - since
        await asyncio.sleep(0.02)


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
