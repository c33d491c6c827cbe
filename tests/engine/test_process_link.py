"""engine/process_link.py and engine/child.py: a real child process, that serves, dies, and is started again."""

from __future__ import annotations

import asyncio
import logging
import os
import signal
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from cache.packed_file import PackedFileError
from engine.async_engine import AsyncEngine
from engine.build import Build
from engine.config import CacheConfig, EngineConfig, SchedulerConfig
from engine.errors import CheckpointError, ConfigError, EngineDead, InvalidRequest
from engine.messages import EngineState, RequestOutput
from engine.process_link import ProcessLink
from engine.restarts import Restarts
from engine.sampling_params import SamplingParams
from tests.engine.conftest import greedy, tokens_of
from tests.engine.test_models import random_prompt
from tests.engine.tiny_models import reference_greedy

ODD = Build("tests.engine.odd_engines:build")


@pytest.fixture
def config(checkpoint: Any) -> EngineConfig:
    return EngineConfig(
        model=checkpoint("olmoe")[0],
        max_model_len=400,
        kv_memory_nbytes=16 * 2**20,
        cache=CacheConfig(format="float32"),
        scheduler=SchedulerConfig(max_num_seqs=4, max_num_batched_tokens=64),
    )


@pytest.fixture
async def engine(config: EngineConfig) -> AsyncIterator[AsyncEngine]:
    engine = AsyncEngine(config, in_child=True, build=ODD)
    await engine.start()
    yield engine
    await engine.stop()


async def collect(engine: AsyncEngine, name: str, prompt: list[int], params: SamplingParams) -> list[RequestOutput]:
    return [output async for output in engine.generate(name, prompt, params)]


def pid_of(engine: AsyncEngine) -> int:
    link = engine._supervisor.link
    assert isinstance(link, ProcessLink)
    assert link.pid is not None
    return link.pid


async def until(engine: AsyncEngine, state: EngineState) -> None:
    for _ in range(3000):
        if engine.stats().state == state:
            return
        await asyncio.sleep(0.01)
    raise AssertionError(f"it is {engine.stats().state}, never {state}")


def is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().split(")")[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


async def test_what_a_thread_does_a_process_does_too(checkpoint: Any, engine: AsyncEngine):
    assert pid_of(engine) != os.getpid()
    prompt = random_prompt(20)
    recording = asyncio.ensure_future(engine.record_trace(seconds=60.0))
    await asyncio.sleep(0)
    outputs = await collect(engine, "a", prompt, greedy(32, logprobs=2))
    assert tokens_of(outputs) == reference_greedy(checkpoint("olmoe")[1], prompt, 32)
    assert sum(len(output.logprobs or []) for output in outputs) == 32  # of a slow reader some come together
    assert "".join(output.text for output in outputs) == await engine.decode(tokens_of(outputs))
    assert engine.end_trace()
    assert (await recording).num_tokens == 51
    ids = await engine.render_chat([{"role": "user", "content": "hé"}])
    assert await engine.decode(ids) == "<|im_start|>user\nhé<|im_end|>\n<|im_start|>assistant\n"
    generator = engine.generate("b", random_prompt(9), SamplingParams(max_tokens=300, ignore_eos=True))
    await anext(generator)
    await generator.aclose()
    assert await engine.integrity_error() is None
    for _ in range(200):
        stats = engine.stats()
        if stats.num_running == stats.kv_blocks_used == 0:
            break
        await asyncio.sleep(0.01)
    assert (stats.num_running, stats.kv_blocks_used, stats.prompt_tokens_total) == (0, 0, 29)
    with pytest.raises(InvalidRequest, match="cannot be passed on"):
        await collect(engine, "c", [1], SamplingParams(stop=("half \ud800",)))
    with pytest.raises(InvalidRequest, match="cannot be passed on"):
        await collect(engine, "c", [1], SamplingParams(top_k=2**70))


async def test_a_killed_engine_fails_what_ran_and_comes_back_by_itself(engine: AsyncEngine):
    alone = tokens_of(await collect(engine, "first", [1, 2], greedy(8)))
    long = SamplingParams(max_tokens=350, ignore_eos=True)
    running = [asyncio.ensure_future(collect(engine, f"r{i}", [1, i], long)) for i in range(6)]
    recording = asyncio.ensure_future(engine.record_trace(seconds=60.0))
    await asyncio.sleep(0.1)
    first_pid = pid_of(engine)
    os.kill(first_pid, signal.SIGKILL)
    for outputs in await asyncio.wait_for(asyncio.gather(*running), 5):
        assert outputs[-1].finish_reason == "error"
    with pytest.raises(EngineDead, match="restarting: killed by SIGKILL"):
        await recording
    assert engine.stats().num_running == 0
    with pytest.raises(EngineDead, match="restarting"):
        await collect(engine, "late", [1], greedy(1))
    await until(engine, "ready")
    assert pid_of(engine) != first_pid
    assert (engine.stats().restarts_total, engine.stats().error) == (1, None)
    assert tokens_of(await collect(engine, "again", [1, 2], greedy(8))) == alone


async def test_what_the_child_logs_is_in_our_log_in_order(config: EngineConfig, caplog: pytest.LogCaptureFixture):
    caplog.set_level(logging.INFO)
    engine = AsyncEngine(config, in_child=True, build=ODD)
    await engine.start()
    await collect(engine, "log", [1], greedy(1))
    await collect(engine, "print", [1], greedy(1))
    for _ in range(500):
        if "last words" in caplog.text:
            break
        await asyncio.sleep(0.01)
    await engine.stop()
    told = [(r.name, r.levelname, r.getMessage()) for r in caplog.records if "odd" in r.name]
    assert told == [("odd", "INFO", "one"), ("odd", "WARNING", "two")]
    assert "engine: last words" in caplog.text


async def test_a_step_that_fails_for_good_is_a_death_with_its_reason(config: EngineConfig):
    engine = AsyncEngine(config, in_child=True, build=ODD, restarts=Restarts(max_deaths=1))
    await engine.start()
    outputs = await asyncio.wait_for(collect(engine, "die", [1], greedy(5)), 5)
    assert outputs[-1].finish_reason == "error"
    await until(engine, "dead")
    assert engine.stats().error == "RuntimeError: boom"
    with pytest.raises(EngineDead, match="boom"):
        await collect(engine, "late", [1], greedy(1))
    await engine.stop()


@pytest.mark.parametrize(
    ("build", "error", "words"),
    [
        (Build(), CheckpointError, r"no config\.json"),
        (Build("tests.engine.odd_engines:refuse", ("ConfigError",)), ConfigError, "lower it"),
        (Build("tests.engine.odd_engines:refuse", ("PackedFileError",)), PackedFileError, "lower it"),
        (Build("tests.engine.odd_engines:refuse", ("KeyError",)), RuntimeError, "KeyError: 'lower it'"),
        (Build("tests.engine.odd_engines:exit_at_once"), EngineDead, "died while it loaded: it ended with status 3"),
    ],
)
async def test_what_is_wrong_at_loading_is_told_as_it_is(
    config: EngineConfig, tmp_path: Path, build: Build, error: type[Exception], words: str
):
    engine = AsyncEngine(replace(config, model=tmp_path), in_child=True, build=build)
    with pytest.raises(error, match=words):
        await engine.start()
    assert engine.stats().state == "dead"
    await engine.stop()


async def test_a_start_that_is_cancelled_leaves_no_process(config: EngineConfig):
    engine = AsyncEngine(config, in_child=True, build=Build("tests.engine.odd_engines:load_for_ever"))
    starting = asyncio.ensure_future(engine.start())
    while not (pids := _children()):
        await asyncio.sleep(0.01)
    await asyncio.sleep(0.2)
    starting.cancel()
    await asyncio.gather(starting, return_exceptions=True)
    assert starting.cancelled()
    assert not any(is_alive(pid) for pid in pids)


async def test_a_child_that_does_not_stop_is_killed(config: EngineConfig):
    engine = AsyncEngine(config, in_child=True, build=ODD)
    await engine.start()
    pid = pid_of(engine)
    hanging = asyncio.ensure_future(collect(engine, "hang", [1], greedy(5)))
    await asyncio.sleep(0.1)
    for signum in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        os.kill(pid, signum)  # of no effect
    assert is_alive(pid)
    await engine.stop()
    assert (await hanging)[-1].finish_reason == "error"
    assert not is_alive(pid)


def _children() -> list[int]:
    mine = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            pid, rest = path.read_text().split(" (")[0], path.read_text().rsplit(")", 1)[1].split()
            command = path.with_name("cmdline").read_bytes()
        except OSError:
            continue
        if int(rest[1]) == os.getpid() and b"engine.child" in command and is_alive(int(pid)):
            mine.append(int(pid))
    return mine
