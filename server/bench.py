"""Speed of any OpenAI-compatible server over HTTP: `foregate bench serve`. Greedy, random prompts, a closed loop.

Knows of the server only its API, so that ours and others are measured alike.
"""

from __future__ import annotations

import asyncio
import random
import statistics
import time
from collections import Counter
from collections.abc import AsyncGenerator, Callable, Iterator, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any

import httpx
import msgspec

from server.remote import RemoteError, api_url, authorization, first_model, post_events

_WARM_UP_TOKENS = 4


@dataclass(frozen=True, slots=True, kw_only=True)
class Workload:
    """What each request asks for. Its prompt is random ids of `token_ids`, so that no prefix is found in a cache."""

    prompt_tokens: int = 137
    output_tokens: int = 64
    token_ids: range = range(1000, 30000)
    timeout_s: float = 600.0  # of a whole request


class Spread(msgspec.Struct, frozen=True):
    """Mean and percentiles; NaN (in JSON null) of nothing."""

    mean: float
    p50: float
    p99: float


class ServingResult(msgspec.Struct, frozen=True, kw_only=True):
    """One line of the bench: so many requests, always `concurrency` of them at once. Figures leave out failed ones."""

    model: str
    concurrency: int
    prompt_tokens: int  # of each request
    output_tokens: int
    num_requests: int  # failed ones included
    num_errors: int
    wall_s: float
    output_tokens_per_s: float  # of all together
    ttft_s: Spread  # from sending a request to its first token
    inter_token_s: Spread  # mean: of requests' (last - first) / (tokens - 1); percentiles: of gaps between chunks
    latency_s: Spread  # from sending a request to the end of its stream
    num_chunks: int  # that brought tokens; where they are fewer than those, some came together
    num_cached_tokens: int  # of prompts, if the server tells; anything but a few spoils the measurement
    errors: dict[str, int]  # message -> times


@dataclass(frozen=True, slots=True)
class Answer:
    """One request as the client saw it: seconds on one clock, tokens as the server counted them."""

    sent_at: float
    chunks_at: list[float]  # not empty
    ended_at: float
    num_tokens: int
    num_cached_tokens: int = 0


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


class _Details(msgspec.Struct):
    cached_tokens: int | None = None


class _Usage(msgspec.Struct):
    prompt_tokens: int
    completion_tokens: int
    prompt_tokens_details: _Details | None = None


class _Choice(msgspec.Struct):
    text: str | None = None
    finish_reason: str | None = None


class _Chunk(msgspec.Struct):
    choices: list[_Choice] = []
    usage: _Usage | None = None


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
        usage: _Usage | None = None
        chunks_at: list[float] = []
        sent_at = self._clock()
        async with aclosing(post_events(self._client, self._url, body)) as events:
            async for event in events:
                now = self._clock()
                chunk = _chunk(event)
                usage = chunk.usage or usage
                # without text and reason: a token that has no text, or not a whole character yet
                if any(choice.text or choice.finish_reason is None for choice in chunk.choices):
                    chunks_at.append(now)
        ended_at = self._clock()
        if usage is None:
            raise RemoteError("the stream had no usage")
        for what, counted, wanted in (
            ("prompt", usage.prompt_tokens, len(prompt)),
            ("output", usage.completion_tokens, output_tokens),
        ):
            if counted != wanted:
                raise RemoteError(f"the server counted {counted} {what} tokens instead of {wanted}")
        if not chunks_at:
            raise RemoteError("the stream had no tokens")
        cached = usage.prompt_tokens_details.cached_tokens if usage.prompt_tokens_details else None
        return Answer(sent_at, chunks_at, ended_at, usage.completion_tokens, cached or 0)

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
    per_token = [(a.chunks_at[-1] - a.chunks_at[0]) / (a.num_tokens - 1) for a in answers if a.num_tokens > 1]
    gaps = [after - before for a in answers for before, after in zip(a.chunks_at, a.chunks_at[1:], strict=False)]
    return ServingResult(
        model=model,
        concurrency=concurrency,
        prompt_tokens=workload.prompt_tokens,
        output_tokens=workload.output_tokens,
        num_requests=len(answers) + errors.total(),
        num_errors=errors.total(),
        wall_s=wall_s,
        output_tokens_per_s=sum(a.num_tokens for a in answers) / wall_s,
        ttft_s=_spread([a.chunks_at[0] - a.sent_at for a in answers]),
        inter_token_s=_spread(gaps, mean_of=per_token),
        latency_s=_spread([a.ended_at - a.sent_at for a in answers]),
        num_chunks=sum(len(a.chunks_at) for a in answers),
        num_cached_tokens=sum(a.num_cached_tokens for a in answers),
        errors=dict(errors),
    )


def _spread(values: list[float], *, mean_of: list[float] | None = None) -> Spread:
    means = values if mean_of is None else mean_of
    mean = statistics.fmean(means) if means else float("nan")
    return Spread(mean, _percentile(values, 50), _percentile(values, 99))


def _percentile(values: list[float], percent: float) -> float:
    """By linear interpolation between the two nearest: _percentile([1, 3], 50) == 2."""
    if not values:
        return float("nan")
    ordered = sorted(values)
    below, share = divmod((len(ordered) - 1) * percent / 100, 1)
    low, high = ordered[int(below)], ordered[min(int(below) + 1, len(ordered) - 1)]
    return low + (high - low) * share


def _chunk(event: dict[str, Any]) -> _Chunk:
    try:
        return msgspec.convert(event, _Chunk)
    except msgspec.ValidationError as exc:
        raise RemoteError(f"an event of the stream is not a completion: {exc}") from None
