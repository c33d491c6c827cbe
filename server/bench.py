"""Speed of any OpenAI-compatible server over HTTP: `foregate bench serve`. Greedy, random prompts, a closed loop.

Knows of the server only its API, so that ours and others are measured alike.
"""

from __future__ import annotations

import asyncio
import random
import time
from collections import Counter
from collections.abc import AsyncGenerator, Callable, Iterator, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any

import httpx
import msgspec

from server.measures import Answer, Figures, StreamTimes, figures
from server.remote import RemoteError, api_url, authorization, first_model, post_events

_WARM_UP_TOKENS = 4


@dataclass(frozen=True, slots=True, kw_only=True)
class Workload:
    """What each request asks for. Its prompt is random ids of `token_ids`, so that no prefix is found in a cache."""

    prompt_tokens: int = 137
    output_tokens: int = 64
    token_ids: range = range(1000, 30000)
    timeout_s: float = 600.0  # of a whole request


class ServingResult(Figures, frozen=True, kw_only=True):
    """One line of the bench: so many requests, always `concurrency` of them at once.

    `num_cached_tokens`: anything but a few spoils the measurement.
    """

    model: str
    concurrency: int
    prompt_tokens: int  # of each request
    output_tokens: int


async def bench_server(
    url: str,
    workload: Workload,
    levels: Sequence[tuple[int, int]],
    *,
    model: str | None = None,
    keys: Sequence[str] = (),
    seed: int | None = None,
) -> AsyncGenerator[ServingResult, None]:
    """Measure each (concurrency, number of requests) in turn, after a warm-up. Without `model` the first one served.

    Requests that fail are counted in the results. Raises `RemoteError` if there is no server or the warm-up fails.
    """
    limits = httpx.Limits(max_connections=None)
    async with httpx.AsyncClient(headers=authorization(keys), limits=limits, timeout=workload.timeout_s) as client:
        api = api_url(url)
        bench = ServingBench(client, api, model or await first_model(client, api), workload, seed=seed)
        await bench.warm_up()
        for concurrency, num_requests in levels:
            yield await bench.run(concurrency, num_requests)


class ServingBench:
    """Sends the requests and keeps the times. `url` is that of the API, with /v1."""

    def __init__(
        self,
        client: httpx.AsyncClient,
        url: str,
        model: str,
        workload: Workload,
        *,
        seed: int | None = None,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        """Without a seed every bench has other prompts: a server may still have those of the last one in its cache."""
        self._client = client
        self._url = f"{url}/completions"
        self._model = model
        self._workload = workload
        self._rng = random.Random(seed)
        self._clock = clock

    async def warm_up(self) -> None:
        """One short request that counts for nothing; raises `RemoteError` if not even that works."""
        try:
            await self._ask(self._prompt(), min(_WARM_UP_TOKENS, self._workload.output_tokens))
        except RemoteError as exc:
            raise RemoteError(f"the first request failed: {exc}") from exc

    async def run(self, concurrency: int, num_requests: int) -> ServingResult:
        """Each of `concurrency` workers sends its next request when its last one has ended, until all are done."""
        prompts = iter([self._prompt() for _ in range(num_requests)])
        answers: list[Answer] = []
        errors: Counter[str] = Counter()
        started = self._clock()
        await asyncio.gather(*(self._work(prompts, answers, errors) for _ in range(concurrency)))
        wall_s = self._clock() - started
        return summarized(self._model, self._workload, concurrency, wall_s, answers, errors)

    async def _work(self, prompts: Iterator[list[int]], answers: list[Answer], errors: Counter[str]) -> None:
        for prompt in prompts:
            try:
                answers.append(await self._ask(prompt, self._workload.output_tokens))
            except RemoteError as exc:
                errors[str(exc)] += 1

    async def _ask(self, prompt: list[int], output_tokens: int) -> Answer:
        timeout_s = self._workload.timeout_s
        try:
            return await asyncio.wait_for(self._stream(prompt, output_tokens), timeout_s)
        except asyncio.TimeoutError:
            raise RemoteError(f"a request did not end within {timeout_s:g} s") from None

    async def _stream(self, prompt: list[int], output_tokens: int) -> Answer:
        body: dict[str, Any] = {
            "model": self._model,
            "prompt": prompt,
            "max_tokens": output_tokens,
            "temperature": 0,
            "ignore_eos": True,
            "skip_special_tokens": False,  # where they have no text, some servers send no chunk for them
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        times = StreamTimes(self._clock())
        async with aclosing(post_events(self._client, self._url, body)) as events:
            async for event in events:
                times.saw(event, self._clock())
        ended_at = self._clock()
        if times.usage is not None:
            for what, counted, wanted in (
                ("prompt", times.usage.prompt_tokens, len(prompt)),
                ("output", times.usage.completion_tokens, output_tokens),
            ):
                if counted != wanted:
                    raise RemoteError(f"the server counted {counted} {what} tokens instead of {wanted}")
        return times.answer(ended_at)

    def _prompt(self) -> list[int]:
        return self._rng.choices(self._workload.token_ids, k=self._workload.prompt_tokens)


def summarized(
    model: str,
    workload: Workload,
    concurrency: int,
    wall_s: float,
    answers: Sequence[Answer],
    errors: Counter[str],
) -> ServingResult:
    """The figures of one concurrency, from the requests that were answered; `errors` counts the others by message."""
    return ServingResult(
        model=model,
        concurrency=concurrency,
        prompt_tokens=workload.prompt_tokens,
        output_tokens=workload.output_tokens,
        **msgspec.structs.asdict(figures(answers, wall_s, errors)),
    )
