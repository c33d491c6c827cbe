"""Running one request's prompts through the engine, and stopping them when nobody is listening any more."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Coroutine, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from hashlib import blake2b
from typing import Any, TypeVar

import msgspec
from starlette.types import Receive

from engine.errors import InvalidRequest
from engine.messages import RequestOutput
from engine.sampling_params import SamplingParams
from server.collect import Collected, Tally
from server.engine_face import Engine
from server.errors import ClientGone, GenerationFailed
from server.request_log import Watcher

T = TypeVar("T")

Outputs = AsyncGenerator[tuple[int, RequestOutput], None]
"""(index of the choice, output) as they come. Closing it aborts whatever still runs."""


@dataclass(frozen=True, slots=True)
class Job:
    """One choice for the engine to make; its place in the list of jobs is its index in the answer."""

    request_id: str
    prompt_token_ids: list[int]
    params: SamplingParams
    prompt_param: str  # what the client calls the prompt
    choice: int = 0  # of those of its prompt; all but the first wait until that one has computed the prompt


def jobs_of(
    request_id: str, prompts: Sequence[list[int]], params: SamplingParams, *, n: int, prompt_param: str
) -> list[Job]:
    """n choices of each prompt, in OpenAI's order. The first one is what it is with n = 1, the seeds of the others
    follow from the request's."""
    others = msgspec.structs.replace(params, prompt_logprobs=None)  # the same for all choices of a prompt
    return [
        Job(
            f"{request_id}-{number * n + choice}",
            prompt,
            params if choice == 0 else msgspec.structs.replace(others, seed=_seed_of(params.seed, choice)),
            prompt_param,
            choice,
        )
        for number, prompt in enumerate(prompts)
        for choice in range(n)
    ]


def _seed_of(seed: int | None, choice: int) -> int | None:
    if seed is None:
        return None
    return int.from_bytes(blake2b(f"{seed} {choice}".encode(), digest_size=8).digest(), "big", signed=True)


async def run_jobs(engine: Engine, jobs: Sequence[Job], watcher: Watcher, *, max_parallel: int) -> Outputs:
    """Up to `max_parallel` jobs at a time, so that one request does not fill the queue by itself.

    The first failure of any ends them all: the engine's errors, or `GenerationFailed`.
    """
    source = _run(engine, jobs[0], 0) if len(jobs) == 1 else _merged(engine, jobs, max_parallel)
    async with aclosing(source):
        async for index, output in source:
            watcher.saw(index, output)
            yield index, output


async def first_output(outputs: Outputs, receive: Receive) -> tuple[int, RequestOutput]:
    """What comes first: an output, the engine's refusal, or `ClientGone`. Closes `outputs` unless it succeeds."""
    try:
        return await unless_gone(receive, anext(outputs))
    except BaseException:
        await outputs.aclose()
        raise


async def collect(outputs: Outputs, receive: Receive, num_choices: int, *, n: int = 1) -> tuple[list[Collected], Tally]:
    """All of it, for an answer in one piece; raises `ClientGone` as soon as the client is."""
    choices = [Collected() for _ in range(num_choices)]
    tally = Tally(n)

    async def gather() -> None:
        async for index, output in outputs:
            choices[index].add(output)
            tally.add(index, output)

    async with aclosing(outputs):
        await unless_gone(receive, gather())
    return choices, tally


async def unless_gone(receive: Receive, work: Coroutine[Any, Any, T]) -> T:
    """The result of `work`, which is cancelled when the client disconnects (then `ClientGone`) or we are."""
    doing = asyncio.ensure_future(work)
    watching = asyncio.ensure_future(disconnected(receive))
    try:
        await asyncio.wait({doing, watching}, return_when=asyncio.FIRST_COMPLETED)
        if not doing.done():
            raise ClientGone
        return doing.result()
    finally:
        doing.cancel()
        watching.cancel()
        await asyncio.gather(doing, watching, return_exceptions=True)


async def disconnected(receive: Receive) -> None:
    """Returns when the client has gone; to be awaited after the body has been read."""
    while (await receive())["type"] != "http.disconnect":
        pass


async def _run(engine: Engine, job: Job, index: int) -> Outputs:
    outputs = engine.generate(job.request_id, job.prompt_token_ids, job.params)
    try:
        async for output in outputs:
            if output.finish_reason == "error":
                raise output.refusal or GenerationFailed(output.error or "generation failed")
            if output.finish_reason == "abort":
                raise GenerationFailed("the request was aborted by the server")
            yield index, output
            if output.finish_reason is not None:
                return
        raise GenerationFailed("generation ended early")
    except InvalidRequest as exc:
        param = job.prompt_param if exc.param == "prompt" else exc.param
        raise InvalidRequest(str(exc), param=param, code=exc.code) from exc
    finally:
        await close_outputs(outputs)


async def close_outputs(outputs: AsyncIterator[RequestOutput]) -> None:
    """Ends a request that may still run."""
    if isinstance(outputs, AsyncGenerator):
        await outputs.aclose()


async def _merged(engine: Engine, jobs: Sequence[Job], max_parallel: int) -> Outputs:
    gate = asyncio.Semaphore(max_parallel)
    queue: asyncio.Queue[tuple[int, RequestOutput] | Exception] = asyncio.Queue()

    computed = [asyncio.Event() for _ in jobs]  # the prompt is

    async def pump(index: int, job: Job) -> None:
        try:
            if job.choice:
                await computed[index - job.choice].wait()
            async with gate, aclosing(_run(engine, job, index)) as outputs:
                async for item in outputs:
                    queue.put_nowait(item)
                    if item[1].token_ids or item[1].finish_reason is not None:
                        computed[index].set()
        except Exception as exc:
            queue.put_nowait(exc)

    pumps = [asyncio.ensure_future(pump(index, job)) for index, job in enumerate(jobs)]
    num_unfinished = len(jobs)
    try:
        while num_unfinished:
            item = await queue.get()
            if isinstance(item, Exception):
                raise item
            yield item
            num_unfinished -= item[1].finish_reason is not None
    finally:
        for task in pumps:
            task.cancel()
        await asyncio.gather(*pumps, return_exceptions=True)
