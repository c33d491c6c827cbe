from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from dataclasses import replace
from itertools import accumulate
from pathlib import Path

import msgspec
import numpy as np
import pytest

from cache.expert_table import ExpertTable
from engine.async_engine import AsyncEngine
from engine.config import CacheConfig, EngineConfig, SchedulerConfig
from engine.engine import Engine
from engine.errors import CheckpointError, EngineDead, EngineOverloaded, InvalidRequest
from engine.messages import (
    AbortRequest,
    AddRequest,
    AskExperts,
    CheckIntegrity,
    EngineStats,
    ExpertsTold,
    IntegrityChecked,
    ModelInfo,
    RequestOutput,
    StartTrace,
    StopTrace,
    TraceRecorded,
)
from engine.sampling_params import SamplingParams
from tests.engine.conftest import greedy, tokens_of
from tests.engine.test_models import random_prompt
from tests.engine.tiny_models import EOS_ID, reference_greedy


@pytest.fixture
def config(checkpoint) -> EngineConfig:
    directory, _ = checkpoint("olmoe")
    return EngineConfig(
        model=directory,
        max_model_len=200,
        kv_memory_nbytes=16 * 2**20,
        cache=CacheConfig(format="float32"),
        scheduler=SchedulerConfig(max_num_seqs=4, max_num_batched_tokens=64, max_num_waiting=4),
    )


@pytest.fixture
async def engine(config: EngineConfig) -> AsyncIterator[AsyncEngine]:
    engine = AsyncEngine(config)
    await engine.start()
    yield engine
    await engine.stop()


async def collect(engine: AsyncEngine, name: str, prompt: list[int], params: SamplingParams) -> list[RequestOutput]:
    return [output async for output in engine.generate(name, prompt, params)]


async def settled(engine: AsyncEngine) -> EngineStats:
    """The statistics once nothing is left to do, seen twice: a snapshot may be older than what was sent last."""
    seen = 0
    for _ in range(200):
        await engine.integrity_error()  # comes after all that was sent before
        stats = engine.stats()
        idle = stats.num_running == stats.num_waiting == stats.kv_blocks_used == stats.last_step_age_s == 0
        seen = seen + 1 if idle else 0
        if seen == 3:
            return stats
        await asyncio.sleep(0.02)
    raise AssertionError(f"never came to rest: {engine.stats()}")


async def test_a_request_streams_the_tokens_of_transformers(checkpoint, engine: AsyncEngine):
    _, model = checkpoint("olmoe")
    prompt = random_prompt(20)
    outputs = await collect(engine, "a", prompt, greedy(32))
    assert tokens_of(outputs) == reference_greedy(model, prompt, 32)
    counts = [output.num_output_tokens for output in outputs]
    assert counts == list(accumulate(len(output.token_ids) for output in outputs))  # some together if we read late
    assert counts[-1] == 32
    assert outputs[-1].finish_reason == "length"
    assert "".join(o.text for o in outputs) == await engine.decode(tokens_of(outputs))


async def test_many_requests_at_once_each_get_their_own(engine: AsyncEngine):
    requests = {f"r{i}": (random_prompt(4 + i, seed=i), greedy(6 + i)) for i in range(8)}
    together = await asyncio.gather(*(collect(engine, name, *request) for name, request in requests.items()))
    for (name, request), outputs in zip(requests.items(), together, strict=True):
        assert {output.request_id for output in outputs} == {name}
        assert tokens_of(outputs) == tokens_of(await collect(engine, "again", *request))
    await settled(engine)
    assert await engine.integrity_error() is None


async def test_eos_ends_a_request_unless_it_is_ignored(engine: AsyncEngine):
    bias = {EOS_ID: 100.0}
    params = SamplingParams(temperature=0.0, max_tokens=5, logit_bias=bias)
    (output,) = await collect(engine, "a", [1, 2, 3], params)
    assert (output.finish_reason, output.stop_reason, output.text, output.token_ids) == ("stop", None, "", [EOS_ID])
    outputs = await collect(engine, "b", [1, 2, 3], msgspec.structs.replace(params, ignore_eos=True))
    assert (outputs[-1].finish_reason, outputs[-1].num_output_tokens) == ("length", 5)


async def test_stop_strings_and_stop_ids_end_a_request_and_are_named(engine: AsyncEngine):
    bias = {ord("x"): 100.0}
    outputs = await collect(
        engine, "a", [1], SamplingParams(max_tokens=9, logit_bias=bias, stop=("xxx",), min_tokens=5)
    )
    assert (outputs[-1].finish_reason, outputs[-1].stop_reason) == ("stop", "xxx")
    assert outputs[-1].num_output_tokens >= 5
    outputs = await collect(engine, "b", [1], SamplingParams(max_tokens=9, logit_bias=bias, stop_token_ids=(ord("x"),)))
    assert (outputs[-1].finish_reason, outputs[-1].stop_reason, outputs[-1].text) == ("stop", ord("x"), "")


async def test_without_max_tokens_the_context_is_the_limit(engine: AsyncEngine):
    outputs = await collect(engine, "a", random_prompt(180), SamplingParams(temperature=0.0, ignore_eos=True))
    assert (outputs[-1].finish_reason, outputs[-1].num_output_tokens) == ("length", 20)


async def test_a_seed_gives_the_same_tokens_again_and_no_seed_does_not(engine: AsyncEngine):
    runs = [await collect(engine, "a", [1, 2], SamplingParams(max_tokens=24, seed=s)) for s in (5, 5, 6, None, None)]
    tokens = [tokens_of(run) for run in runs]
    assert tokens[0] == tokens[1]
    assert tokens[0] != tokens[2]
    assert tokens[3] != tokens[4]


@pytest.mark.parametrize("num_outputs", [0, 1, 3])
async def test_a_closed_generator_aborts_its_request_and_frees_all_it_held(engine: AsyncEngine, num_outputs: int):
    generator = engine.generate("a", random_prompt(100), SamplingParams(max_tokens=90, ignore_eos=True))
    if num_outputs == 0:
        task = asyncio.ensure_future(generator.__anext__())
        await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
    for _ in range(num_outputs):
        await generator.__anext__()
    await generator.aclose()
    stats = await settled(engine)
    assert stats.output_tokens_total < 90
    assert await engine.integrity_error() is None


async def test_a_full_queue_is_refused_at_once_and_serves_again_later(engine: AsyncEngine):
    tasks = [asyncio.ensure_future(collect(engine, f"r{i}", random_prompt(50, seed=i), greedy(30))) for i in range(8)]
    await asyncio.sleep(0)
    with pytest.raises(EngineOverloaded, match="queue is full"):
        await collect(engine, "late", [1], greedy(1))
    await asyncio.gather(*tasks)
    assert tokens_of(await collect(engine, "late", [1], greedy(1)))


@pytest.mark.parametrize(
    ("prompt", "params", "param", "why"),
    [
        ([], {}, "prompt", "empty"),
        ([1] * 200, {}, "prompt", "maximum context length is 200 tokens"),
        ([1] * 150, {"max_tokens": 51}, "max_tokens", "maximum context length is 200 tokens"),
        ([1, 9999], {}, "prompt", "between 0 and 271"),
        ([1], {"logit_bias": {9999: 1.0}}, "logit_bias", "beyond the vocabulary"),
        ([1], {"stop_token_ids": (9999,)}, "stop_token_ids", "beyond the vocabulary"),
    ],
)
async def test_what_cannot_be_served_is_refused_at_the_door(engine: AsyncEngine, prompt, params, param, why):
    with pytest.raises(InvalidRequest, match=why) as caught:
        await collect(engine, "a", prompt, SamplingParams(**params))
    assert caught.value.param == param
    assert engine.stats().prompt_tokens_total == 0


async def test_what_is_known_of_each_expert_is_told_while_requests_run(engine: AsyncEngine):
    running = asyncio.ensure_future(collect(engine, "a", random_prompt(20), greedy(40)))
    first, same = await asyncio.gather(engine.expert_table(), engine.expert_table())
    await running
    after = await engine.expert_table()
    assert first is same  # asked for once
    assert after is not None
    queries = np.frombuffer(after.queries, "<u8")
    stats = engine.stats().expert_cache
    assert queries.sum() == stats.decode.queries + stats.prefill.queries > 0
    assert (after.layers, after.num_experts) == ([0, 1], 8)
    assert after.residency.count(2) == stats.num_slots_used
    assert np.frombuffer(after.recent, "<f4").sum() == pytest.approx(queries.sum(), rel=0.5)


async def test_who_asks_an_engine_that_fails_is_told_so(engine: AsyncEngine, monkeypatch: pytest.MonkeyPatch):
    def boom(self: Engine) -> None:
        raise RuntimeError("boom")

    monkeypatch.setattr(Engine, "expert_table", boom)
    with pytest.raises(EngineDead, match="the engine failed"):
        await asyncio.wait_for(engine.expert_table(), 10)
    with pytest.raises(EngineDead, match="boom"):
        await engine.expert_table()


async def test_who_stops_asking_takes_the_answer_from_nobody(engine: AsyncEngine):
    leaving, staying = (asyncio.ensure_future(engine.expert_table()) for _ in range(2))
    await asyncio.sleep(0)
    leaving.cancel()
    assert await asyncio.wait_for(staying, 10) is not None


async def test_when_the_engine_fails_every_request_ends_with_an_error_and_no_more_are_taken(engine, monkeypatch):
    real_step, steps = Engine.step, []

    def fail_later(self: Engine) -> list[RequestOutput]:
        steps.append(1)
        if len(steps) > 3:
            raise RuntimeError("boom")
        return real_step(self)

    monkeypatch.setattr(Engine, "step", fail_later)
    results = await asyncio.wait_for(
        asyncio.gather(*(collect(engine, f"r{i}", random_prompt(9, seed=i), greedy(50)) for i in range(6))), 10
    )
    assert {outputs[-1].finish_reason for outputs in results} == {"error"}
    stats = engine.stats()
    assert (stats.state, stats.error) == ("dead", "RuntimeError: boom")
    with pytest.raises(EngineDead, match="boom"):
        await collect(engine, "late", [1], greedy(1))


async def test_books_that_do_not_add_up_are_told_and_the_engine_works_on(engine: AsyncEngine, monkeypatch):
    def broken(self: Engine) -> None:
        raise AssertionError("a block is lost")

    with monkeypatch.context() as patched:
        patched.setattr(Engine, "check_integrity", broken)
        running = asyncio.ensure_future(collect(engine, "a", random_prompt(20), greedy(40)))
        assert await engine.integrity_error() == "a block is lost"
    assert len(tokens_of(await running)) == 40
    await settled(engine)
    assert await engine.integrity_error() is None


async def test_an_engine_that_fails_leaves_nobody_waiting_for_its_books(engine: AsyncEngine, monkeypatch):
    def boom(self: Engine) -> None:
        raise RuntimeError("boom")

    monkeypatch.setattr(Engine, "check_integrity", boom)
    with pytest.raises(EngineDead):
        await asyncio.wait_for(engine.integrity_error(), 10)
    with pytest.raises(EngineDead, match="boom"):
        await engine.integrity_error()


async def test_stop_drains_what_is_in_flight_and_takes_nothing_new(config: EngineConfig):
    engine = AsyncEngine(config)
    await engine.start()
    task = asyncio.ensure_future(collect(engine, "a", random_prompt(20), greedy(40)))
    await asyncio.sleep(0)
    stopping = asyncio.ensure_future(engine.stop(drain_s=30.0))
    await asyncio.sleep(0)
    with pytest.raises(EngineDead, match="draining"):
        await collect(engine, "late", [1], greedy(1))
    outputs = await task
    assert (outputs[-1].finish_reason, outputs[-1].num_output_tokens) == ("length", 40)
    await stopping
    assert engine.stats().state == "stopped"


async def test_stop_without_time_to_drain_ends_streams_with_an_error(config: EngineConfig):
    engine = AsyncEngine(config)
    await engine.start()
    answer = engine.generate("a", random_prompt(20), greedy(150))
    await anext(answer)
    await engine.stop()
    outputs = [output async for output in answer]
    assert outputs[-1].finish_reason == "error"


async def test_a_model_that_cannot_be_loaded_is_told_by_start(config: EngineConfig, tmp_path: Path):
    engine = AsyncEngine(replace(config, model=tmp_path))
    with pytest.raises(CheckpointError, match=r"no config\.json"):
        await engine.start()
    assert engine.stats().state == "dead"
    await engine.stop()


async def test_chat_messages_go_through_the_models_template(engine: AsyncEngine):
    ids = await engine.render_chat([{"role": "user", "content": "hé"}])
    assert await engine.decode(ids) == "<|im_start|>user\nhé<|im_end|>\n<|im_start|>assistant\n"
    assert ids[0] == 257


async def test_a_text_far_too_long_for_the_model_is_refused_before_all_of_it_is_tokenised(engine: AsyncEngine):
    seen: list[int] = []
    tokenizer = engine._supervisor.tokenizer
    encode = tokenizer.encode
    tokenizer.encode = lambda text, **kw: seen.append(len(text)) or encode(text, **kw)
    for made, param in (
        (engine.encode("ab" * 500_000), "prompt"),
        (engine.render_chat([{"role": "user", "content": "ab" * 500_000}]), "messages"),
    ):
        with pytest.raises(InvalidRequest, match=r"^This model's maximum context length is 200 tokens\.") as refusal:
            await made
        assert (refusal.value.param, refusal.value.code) == (param, "context_length_exceeded")
    assert max(seen) == 32 * 200
    assert len(await engine.encode("ab" * 3000)) == 6000  # of what is not, the model's limit is the caller's affair


async def test_so_many_tokens_wait_and_more_are_turned_away(config: EngineConfig):
    engine = AsyncEngine(replace(config, scheduler=replace(config.scheduler, max_num_seqs=1, max_queued_tokens=100)))
    await engine.start()
    long = random_prompt(90)
    running = asyncio.ensure_future(collect(engine, "running", [1], greedy(100)))
    while engine.stats().num_running == 0:
        await asyncio.sleep(0.01)
    waiting = asyncio.ensure_future(collect(engine, "waiting", long, greedy(2)))
    await asyncio.sleep(0)
    with pytest.raises(EngineOverloaded, match="prompts of 90 tokens wait"):
        await collect(engine, "late", [1] * 11, greedy(1))
    await asyncio.gather(running, waiting, collect(engine, "short", [1] * 10, greedy(1)))
    assert tokens_of(
        await collect(engine, "longer", random_prompt(150), greedy(1))
    )  # alone it may be as long as can be
    await settled(engine)
    await engine.stop()


def test_messages_survive_the_wire():
    params = SamplingParams(stop=("a", "b"), logit_bias={3: 1.5}, stop_token_ids=(1, 2), seed=3)
    messages = [
        AddRequest("r", [1, 2, 3], params),
        AbortRequest("r"),
        StartTrace("t", 5, "chat"),
        StopTrace("t", discard=True),
        TraceRecorded(trace_id="t", npz=bytes(range(256)), num_tokens=1, num_requests=1, is_full=True),
        AskExperts(3),
        ExpertsTold(
            3,
            ExpertTable(
                layers=[1],
                num_experts=1,
                half_life_s=1.0,
                queries=bytes(8),
                hits=bytes(8),
                recent=bytes(4),
                residency=b"\x02",
            ),
        ),
        ExpertsTold(4, None),
        ModelInfo(
            name="m",
            model_type="olmoe",
            max_model_len=1,
            vocab_size=2,
            has_chat_template=False,
            dtype="float32",
            expert_format=None,
        ),
        EngineStats(state="ready"),
        CheckIntegrity("c"),
        IntegrityChecked("c", "a block is lost"),
    ]
    for message in messages:
        wire = msgspec.msgpack.encode(message)
        assert msgspec.msgpack.decode(wire, type=type(message)) == message
