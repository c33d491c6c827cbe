"""server/bench.py: against our application around a scripted engine, and against servers that misbehave."""

from __future__ import annotations

import json
import math
from collections import Counter
from dataclasses import replace
from typing import Any

import httpx
import msgspec
import pytest

from engine.errors import EngineOverloaded
from server.bench import ServingBench, ServingResult, Workload, bench_server, summarized
from server.measures import Answer, Spread
from server.remote import RemoteError
from tests.server.fake_engine import FakeEngine, Script, Token
from tests.server.test_serve import running

WORKLOAD = Workload(prompt_tokens=8, output_tokens=5, token_ids=range(256))
ENOUGH = Script([Token("x")] * 64)


def bench_of(client: httpx.AsyncClient, workload: Workload = WORKLOAD, seed: int | None = None) -> ServingBench:
    return ServingBench(client, "http://test/v1", "fake", workload, seed=seed)


async def test_each_request_asks_for_the_same_and_is_counted(client: httpx.AsyncClient, engine: FakeEngine) -> None:
    engine.script = ENOUGH
    result = await bench_of(client).run(3, 7)
    assert (result.model, result.concurrency, result.prompt_tokens, result.output_tokens) == ("fake", 3, 8, 5)
    assert (result.num_requests, result.num_errors, result.errors) == (7, 0, {})
    assert (result.num_chunks, result.num_cached_tokens) == (35, 0)
    assert result.output_tokens_per_s == pytest.approx(35 / result.wall_s)
    assert len(engine.seen) == 7
    for _, prompt, params in engine.seen:
        assert len(prompt) == 8
        assert (params.temperature, params.max_tokens, params.ignore_eos) == (0.0, 5, True)
        assert not params.skip_special_tokens


async def test_prompts_differ_unless_a_seed_repeats_them(client: httpx.AsyncClient, engine: FakeEngine) -> None:
    engine.script = ENOUGH
    for seed in (1, 1, 2, None, None):
        await bench_of(client, seed=seed).run(1, 3)
    prompts = [tuple(prompt) for _, prompt, _ in engine.seen]
    assert prompts[:3] == prompts[3:6]
    assert len(set(prompts)) == 12


async def test_always_so_many_requests_are_in_flight_as_asked_for(
    client: httpx.AsyncClient, engine: FakeEngine
) -> None:
    open_when_started = []

    def script(prompt: list[int]) -> Script:
        open_when_started.append(engine.num_open)
        return Script([Token("x", delay_s=0.001)] * 5)

    engine.script = script
    await bench_of(client).run(3, 9)
    assert open_when_started[:3] == [0, 1, 2]
    assert max(open_when_started) == 2
    assert len(open_when_started) == 9


@pytest.mark.parametrize(
    ("bad", "error"),
    [
        (Script([Token("x")] * 3), "the server counted 3 output tokens instead of 5"),
        (Script(refusal=EngineOverloaded("the queue is full")), "the server answered 503: the queue is full"),
        (Script([], failure=RuntimeError("secret")), "the server answered 500: internal server error"),
        (Script([Token("x")] * 2, finish_reason="error", error="an expert is broken"), "an expert is broken"),
        (Script([Token("x")], failure=RuntimeError("secret")), "internal server error"),
    ],
    ids=["short", "refused", "failed", "error in the stream", "failed in the stream"],
)
async def test_what_fails_is_counted_by_its_reason_and_the_rest_measured(
    client: httpx.AsyncClient, engine: FakeEngine, bad: Script, error: str
) -> None:
    scripts = iter([ENOUGH, bad, ENOUGH, bad])
    engine.script = lambda prompt: next(scripts)
    result = await bench_of(client).run(1, 4)
    assert (result.num_requests, result.num_errors) == (4, 2)
    ((reason, times),) = result.errors.items()
    assert reason.startswith(error)
    assert times == 2
    assert result.num_chunks == 10
    assert result.output_tokens_per_s == pytest.approx(10 / result.wall_s)


async def test_a_request_that_takes_too_long_is_given_up(client: httpx.AsyncClient, engine: FakeEngine) -> None:
    engine.script = Script([Token("x"), Token("x", delay_s=30.0)])
    workload = replace(WORKLOAD, timeout_s=0.05)
    result = await bench_of(client, workload).run(2, 2)
    assert result.errors == {"a request did not end within 0.05 s": 2}
    assert engine.num_open == 0


def stream(*events: dict[str, Any]) -> str:
    return "".join(f"data: {json.dumps(event)}\n\n" for event in events) + "data: [DONE]\n\n"


def token(text: str | None, finish_reason: str | None = None) -> dict[str, Any]:
    return {"choices": [{"index": 0, "text": text, "finish_reason": finish_reason}]}


def usage(prompt_tokens: int = 8, completion_tokens: int = 5, **more: Any) -> dict[str, Any]:
    counts = {"prompt_tokens": prompt_tokens, "completion_tokens": completion_tokens, **more}
    return {"choices": [], "usage": counts}


async def result_of(content: str) -> ServingResult:
    transport = httpx.MockTransport(lambda _: httpx.Response(200, content=content))
    async with httpx.AsyncClient(transport=transport) as client:
        return await bench_of(client).run(1, 1)


@pytest.mark.parametrize(
    ("content", "error"),
    [
        (stream(token("x")), "the stream had no usage"),
        (stream(usage()), "the stream had no tokens"),
        (stream(token("x"), usage(prompt_tokens=9)), "the server counted 9 prompt tokens instead of 8"),
        (stream(token("x"), usage(completion_tokens=1)), "the server counted 1 output tokens instead of 5"),
        (stream({"choices": 3}), "an event of the stream is not a completion: Expected `array`"),
        (stream({"usage": {"prompt_tokens": 8}}), "an event of the stream is not a completion"),
        ("data: [DONE]\n\n", "the stream had no usage"),
        ("", "the stream ended without [DONE]"),
    ],
)
async def test_an_answer_that_is_not_what_was_asked_for_is_an_error(content: str, error: str) -> None:
    (reason,) = (await result_of(content)).errors
    assert reason.startswith(error)


async def test_tokens_without_text_count_and_the_end_of_the_stream_does_not() -> None:
    content = stream(token("a"), token(""), token(None), token("", "length"), usage())
    assert (await result_of(content)).num_chunks == 3
    assert (await result_of(stream(token("a"), token("b", "length"), usage()))).num_chunks == 2


async def test_usage_may_come_with_any_chunk_and_tell_of_cached_tokens() -> None:
    every = [{**token("x"), "usage": usage(completion_tokens=n + 1)["usage"]} for n in range(5)]
    assert (await result_of(stream(*every))).num_errors == 0
    for details, num_cached in (({"cached_tokens": 6}, 6), ({"cached_tokens": None}, 0), (None, 0)):
        content = stream(token("x"), usage(prompt_tokens_details=details))
        assert (await result_of(content)).num_cached_tokens == num_cached


async def test_servers_are_measured_level_by_level_after_a_short_request(engine: FakeEngine) -> None:
    engine.script = ENOUGH
    async with running(engine) as (server, client):
        await server.until(client, "/health", 200)
        results = [r async for r in bench_server(f"{server.url}/v1", WORKLOAD, [(1, 2), (3, 4)])]
    assert [(r.model, r.concurrency, r.num_requests, r.num_errors) for r in results] == [
        ("fake", 1, 2, 0),
        ("fake", 3, 4, 0),
    ]
    assert [params.max_tokens for _, _, params in engine.seen] == [4] + [5] * 6


async def test_a_first_request_that_fails_ends_the_bench(engine: FakeEngine) -> None:
    async with running(engine) as (server, client):
        await server.until(client, "/health", 200)
        with pytest.raises(RemoteError, match="the first request failed: the server answered 404: the model `b`"):
            [r async for r in bench_server(server.url, WORKLOAD, [(1, 2)], model="b")]


def test_figures_are_of_the_times_that_were_seen() -> None:
    answers = [
        Answer(sent_at=10.0, chunks_at=[11.0, 12.0, 14.0], ended_at=14.5, num_tokens=3, num_cached_tokens=2),
        Answer(sent_at=10.0, chunks_at=[13.0, 16.0], ended_at=16.0, num_tokens=4),  # two came together
    ]
    result = summarized("m", WORKLOAD, 2, 7.0, answers, Counter({"broken": 3}))
    assert result.ttft_s == Spread(2.0, 2.0, pytest.approx(2.8), pytest.approx(2.98))
    assert result.inter_token_s == Spread(
        1.25, 2.0, pytest.approx(2.8), pytest.approx(2.98)
    )  # (3/2 + 3/3) / 2; of 1, 2 and 3
    assert result.latency_s == Spread(5.25, 5.25, pytest.approx(5.85), pytest.approx(5.985))
    assert result.output_tokens_per_s == 1.0
    assert (result.num_requests, result.num_errors, result.errors) == (5, 3, {"broken": 3})
    assert (result.num_chunks, result.num_cached_tokens) == (5, 2)


def test_figures_of_nothing_are_not_numbers() -> None:
    result = summarized("m", WORKLOAD, 1, 2.0, [], Counter({"broken": 1}))
    assert result.output_tokens_per_s == 0.0
    assert math.isnan(result.ttft_s.p99)
    assert json.loads(msgspec.json.encode(result))["latency_s"] == dict.fromkeys(("mean", "p50", "p90", "p99"))
