"""Recording the routing of an engine that runs: what is recorded is what was routed, from then on and until then."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from torch import Tensor

from cache.trace import RoutingTrace, load
from engine.async_engine import AsyncEngine
from engine.batch import Batch
from engine.config import CacheConfig, EngineConfig
from engine.engine import Engine
from engine.errors import EngineDead, InvalidRequest, RecordingInProgress
from engine.link import ThreadLink
from engine.messages import RequestOutput, StartTrace, TraceRecorded
from engine.sampling_params import SamplingParams
from kernels.backend import Routing
from tests.engine.conftest import greedy, run_all, tokens_of
from tests.engine.test_models import random_prompt


class Watch:
    """An observer of the plainest kind: request, position -> token id, experts of each layer."""

    def __init__(self) -> None:
        self.seen: dict[tuple[int, int], tuple[int, list[list[int]]]] = {}

    def step_begins(self, batch: Batch) -> None:
        self.layers: list[list[list[int]]] = []

    def layer_begins(self, index: int, x: Tensor, routing: Routing, batch: Batch) -> None:
        self.layers.append(routing.ids.tolist())
        positions = batch.sequences.positions.tolist()
        if index == len(self.layers) - 1:
            for row, key in enumerate(zip(batch.requests, positions, strict=True)):
                self.seen[key] = int(batch.token_ids[row]), [layer[row] for layer in self.layers]

    def step_ends(self) -> None: ...

    def request_ends(self, number: int) -> None: ...


def start(
    engine: Engine, max_tokens: int = 1000, when_full: Callable[[], None] = lambda: None, name: str = "t"
) -> None:
    engine.recordings.start(StartTrace(name, max_tokens, "chat"), engine.scheduler.requests, when_full)


def stop(engine: Engine, tmp_path: Path) -> RoutingTrace:
    recording = engine.recordings.stop()
    assert recording is not None
    return unpacked(recording.packed(), tmp_path)


def unpacked(recorded: TraceRecorded, tmp_path: Path) -> RoutingTrace:
    (tmp_path / "recorded.npz").write_bytes(recorded.npz)
    trace = load(tmp_path / "recorded.npz")
    assert (trace.num_tokens, trace.num_requests) == (recorded.num_tokens, recorded.num_requests)
    return trace


def check_same(trace: RoutingTrace, watch: Watch) -> None:
    rows = [watch.seen[key] for key in sorted(watch.seen)]
    assert trace.token_ids is not None
    assert trace.token_ids.tolist() == [token for token, _ in rows]
    assert trace.ids.tolist() == [layers for _, layers in rows]


def steps(engine: Engine, num: int) -> None:
    for _ in range(num):
        engine.step()


def test_what_is_recorded_is_what_an_observer_sees_and_the_file_has_it_all(checkpoint, make_engine, tmp_path):
    engine = make_engine(
        checkpoint("olmoe")[0], record_trace=tmp_path / "all.npz", scheduler={"max_num_batched_tokens": 32}
    )
    everything, watch = Watch(), Watch()
    engine.observe(everything)
    engine.add_request("old", random_prompt(50, seed=1), greedy(20))
    engine.add_request("older", random_prompt(5, seed=2), greedy(20))
    steps(engine, 1)  # 32 tokens: one prompt is cut
    num_before = len(everything.seen)
    start(engine)
    engine.observe(watch)
    engine.add_request("new", random_prompt(9, seed=3), greedy(4))
    steps(engine, 10)
    trace = stop(engine, tmp_path)
    seen = dict(watch.seen)
    while engine.has_work:
        engine.step()
    assert len(watch.seen) > len(seen)
    watch.seen = seen
    check_same(trace, watch)
    prompts = {0: 50, 1: 5, 2: 9}
    assert trace.num_prompt.tolist() == [sum(r == n and p < prompts[n] for r, p in seen) for n in prompts]
    assert trace.num_prompt.sum() == 64 - num_before
    assert trace.domains == ("chat",) * 3
    engine.close()
    check_same(load(tmp_path / "all.npz"), everything)


def test_a_request_that_decodes_when_recording_starts_has_no_prompt(checkpoint, make_engine, tmp_path):
    engine = make_engine(checkpoint("olmoe")[0])
    engine.add_request("a", random_prompt(20), greedy(12))
    steps(engine, 3)
    start(engine)
    steps(engine, 4)
    trace = stop(engine, tmp_path)
    assert (trace.num_prompt.tolist(), trace.seq_off.tolist()) == ([0], [0, 4])
    assert engine.recordings.stop() is None


def test_nothing_watches_once_recording_has_ended_and_results_are_the_same(checkpoint, make_engine, tmp_path):
    engine = make_engine(checkpoint("olmoe")[0])
    request = {"a": (random_prompt(20), greedy(12))}
    before = list(engine._observers._observers)
    expected = tokens_of(run_all(engine, request)["a"])
    start(engine)
    assert len(engine._observers._observers) == len(before) + 1
    assert tokens_of(run_all(engine, request)["a"]) == expected
    assert stop(engine, tmp_path).num_requests == 1
    assert engine._observers._observers == before


@pytest.mark.parametrize(("bound", "num_prompt"), [(12, 10), (4, 4), (1, 1)])
def test_a_recording_is_bounded_to_the_token_and_says_so_once(checkpoint, make_engine, tmp_path, bound, num_prompt):
    engine = make_engine(checkpoint("olmoe")[0])
    told: list[str] = []
    start(engine, bound, lambda: told.append("full"))
    run_all(engine, {"a": (random_prompt(10), greedy(9)), "b": (random_prompt(3), greedy(2))})
    recording = engine.recordings.stop()
    assert recording is not None
    recorded = recording.packed()
    trace = unpacked(recorded, tmp_path)
    assert (trace.num_tokens, recorded.is_full, told) == (bound, True, ["full"])
    assert int(trace.num_prompt[0]) == num_prompt


def test_preempted_requests_have_every_token_once(checkpoint, make_engine, tmp_path):
    directory, _ = checkpoint("olmoe")
    engine = make_engine(directory, max_model_len=160, kv_memory_nbytes=10 * 16 * 1024, scheduler={"max_num_seqs": 4})
    watch = Watch()
    engine.observe(watch)
    start(engine)
    run_all(engine, {f"r{i}": (random_prompt(20, seed=i), greedy(60)) for i in range(4)})
    assert engine.stats().preemptions_total
    trace = stop(engine, tmp_path)
    check_same(trace, watch)
    assert len(watch.seen) == trace.num_tokens


def test_a_long_recording_is_kept_in_chunks(checkpoint, make_engine, tmp_path, monkeypatch):
    monkeypatch.setattr("engine.trace_recorder._CHUNK_TOKENS", 16)
    engine = make_engine(checkpoint("olmoe")[0])
    watch = Watch()
    engine.observe(watch)
    start(engine)
    run_all(engine, {f"r{i}": (random_prompt(7 + 9 * i, seed=i), greedy(15)) for i in range(4)})
    check_same(stop(engine, tmp_path), watch)


def test_an_empty_recording_is_a_trace_without_tokens(checkpoint, make_engine, tmp_path):
    engine = make_engine(checkpoint("olmoe")[0])
    start(engine)
    trace = stop(engine, tmp_path)
    assert (trace.num_tokens, trace.num_requests, trace.layers) == (0, 0, engine.moe.layers)


# Through the engine's face, from the event loop.


@pytest.fixture
async def engine(checkpoint: Any) -> AsyncIterator[AsyncEngine]:
    engine = AsyncEngine(
        EngineConfig(
            model=checkpoint("olmoe")[0],
            max_model_len=200,
            kv_memory_nbytes=16 * 2**20,
            cache=CacheConfig(format="float32"),
        )
    )
    await engine.start()
    yield engine
    await engine.stop()


async def collect(engine: AsyncEngine, name: str, prompt: list[int], params: SamplingParams) -> list[RequestOutput]:
    return [output async for output in engine.generate(name, prompt, params)]


async def test_a_running_request_is_recorded_from_there_on(engine: AsyncEngine, tmp_path: Path):
    outputs = engine.generate("a", random_prompt(30), greedy(100))
    first = await anext(outputs)
    recording = asyncio.ensure_future(engine.record_trace(seconds=60.0, domain="x"))
    await asyncio.sleep(0)
    late = await collect(engine, "b", random_prompt(8, seed=5), greedy(5))
    assert engine.end_trace()
    trace = unpacked(await recording, tmp_path)
    rest = [output async for output in outputs]
    assert not engine.end_trace()
    tokens = trace.select(1, 2).token_ids
    assert tokens is not None
    assert tokens.tolist() == [*random_prompt(8, seed=5), *tokens_of(late)[:-1]]
    assert trace.num_prompt.tolist() == [0, 8]
    of_running = trace.select(0, 1).token_ids
    assert of_running is not None
    answer = tokens_of([first, *rest])
    at = next(i for i in range(len(answer)) if answer[i : i + len(of_running)] == of_running.tolist())
    assert 0 <= at < 100
    assert trace.domains == ("x", "x")


async def test_recording_ends_by_itself_when_the_time_is_over_or_it_is_full(engine: AsyncEngine):
    recorded = await engine.record_trace(seconds=0.05)
    assert (recorded.num_tokens, recorded.is_full, recorded.error) == (0, False, None)
    recording = asyncio.ensure_future(engine.record_trace(seconds=60.0, max_tokens=25))
    await asyncio.sleep(0)
    await collect(engine, "a", random_prompt(20), greedy(30))
    recorded = await asyncio.wait_for(recording, 10.0)
    assert (recorded.num_tokens, recorded.is_full) == (25, True)


async def test_one_at_a_time_and_a_cancelled_one_makes_room_at_once(engine: AsyncEngine, tmp_path: Path):
    first = asyncio.ensure_future(engine.record_trace(seconds=60.0))
    await asyncio.sleep(0.02)
    with pytest.raises(RecordingInProgress):
        await engine.record_trace(seconds=60.0)
    first.cancel()
    await asyncio.gather(first, return_exceptions=True)
    second = asyncio.ensure_future(engine.record_trace(seconds=60.0))
    await asyncio.sleep(0)
    await collect(engine, "a", random_prompt(20), greedy(3))
    engine.end_trace()
    assert unpacked(await second, tmp_path).num_tokens == 22
    link = engine._supervisor.link
    assert isinstance(link, ThreadLink)
    assert link._engine is not None
    assert link._engine.recordings._asked is None


async def test_stopping_the_engine_ends_a_recording_which_is_answered(engine: AsyncEngine, tmp_path: Path):
    recording = asyncio.ensure_future(engine.record_trace(seconds=60.0))
    await asyncio.sleep(0)
    await collect(engine, "a", random_prompt(20), greedy(3))
    await engine.stop()
    assert unpacked(await recording, tmp_path).num_tokens == 22
    with pytest.raises(EngineDead):
        await engine.record_trace(seconds=1.0)


async def test_an_engine_that_fails_fails_the_recording(engine: AsyncEngine, monkeypatch):
    def fail(self: Engine) -> list[RequestOutput]:
        raise RuntimeError("boom")

    monkeypatch.setattr(Engine, "step", fail)
    with pytest.raises(EngineDead, match="boom"):
        await asyncio.wait_for(engine.record_trace(seconds=60.0), 10.0)


async def test_a_recording_that_cannot_be_packed_is_an_error_and_the_engine_goes_on(engine: AsyncEngine, monkeypatch):
    monkeypatch.setattr(RoutingTrace, "save", lambda self, path: np.load("nowhere"))
    with pytest.raises(RuntimeError, match="FileNotFoundError"):
        await engine.record_trace(seconds=0.02)
    assert await collect(engine, "a", [1, 2], greedy(2))


async def test_a_dense_model_has_nothing_to_record(checkpoint, tmp_path: Path):
    engine = AsyncEngine(EngineConfig(model=checkpoint("llama-llama3-rope")[0], kv_memory_nbytes=16 * 2**20))
    await engine.start()
    try:
        with pytest.raises(InvalidRequest, match="no experts"):
            await engine.record_trace(seconds=1.0)
    finally:
        await engine.stop()
