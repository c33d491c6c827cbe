"""server/routes/operate.py, and what it asks of the engine."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import httpx
import pytest

from engine.async_engine import AsyncEngine
from engine.config import CacheConfig, EngineConfig, SchedulerConfig
from engine.errors import InvalidRequest
from engine.sampling_params import SamplingParams
from server.auth import hash_key
from tests.engine.tiny_models import make_checkpoint
from tests.server.fake_engine import FakeEngine

KEY = {"Authorization": "Bearer key"}


@pytest.fixture
def admin(connect: Callable[..., httpx.AsyncClient]) -> httpx.AsyncClient:
    client = connect(api_key_hashes=(hash_key("key"),))
    client.headers.update(KEY)
    return client


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("olmoe")
    make_checkpoint(directory, "olmoe")
    return directory


@pytest.fixture
async def offloaded(directory: Path) -> AsyncIterator[AsyncEngine]:
    """An engine with 10 slots for its 16 experts."""
    record_nbytes = 3 * 64 * 32 * 4
    config = EngineConfig(
        model=directory,
        max_model_len=128,
        kv_memory_nbytes=16 * 2**20,
        cache=CacheConfig(format="float32", memory_nbytes=10 * record_nbytes, predictor="off"),
        scheduler=SchedulerConfig(max_num_seqs=4, max_num_batched_tokens=64),
    )
    engine = AsyncEngine(config)
    await engine.start()
    yield engine
    await engine.stop()


async def top_tier(engine: AsyncEngine) -> set[tuple[int, int]]:
    """Which experts are there, once nothing is on its way."""
    while await engine.integrity_error():
        await asyncio.sleep(0.005)
    table = await engine.expert_table()
    assert table is not None
    width = table.num_experts
    return {(table.layers[i // width], i % width) for i, tier in enumerate(table.residency) if tier == 2}


async def answer(engine: AsyncEngine, name: str) -> list[int]:
    params = SamplingParams(temperature=0.0, max_tokens=12, ignore_eos=True)
    return [token async for output in engine.generate(name, list(range(40)), params) for token in output.token_ids]


async def test_experts_are_forgotten_warmed_and_kept_and_no_token_changes(offloaded: AsyncEngine) -> None:
    first = await answer(offloaded, "a")
    assert len(await top_tier(offloaded)) == offloaded.stats().expert_cache.num_slots
    assert await offloaded.control_cache("reset") > 0
    assert await top_tier(offloaded) == set()
    assert await offloaded.control_cache("warm", [(1, 7), (0, 3)]) == 2
    assert await top_tier(offloaded) == {(1, 7), (0, 3)}
    assert await offloaded.control_cache("warm") == offloaded.stats().expert_cache.num_slots - 2  # no more than fit
    kept = [(0, 0), (0, 1), (1, 6)]
    await offloaded.control_cache("pin", kept)
    assert set(kept) <= await top_tier(offloaded)
    assert await answer(offloaded, "b") == first
    assert set(kept) <= await top_tier(offloaded)
    await offloaded.control_cache("reset")
    assert await top_tier(offloaded) == set(kept)
    assert await offloaded.control_cache("pin", []) == 0
    await offloaded.control_cache("reset")
    assert await top_tier(offloaded) == set()
    assert await answer(offloaded, "c") == first


async def test_what_cannot_be_kept_is_refused_and_changes_nothing(offloaded: AsyncEngine) -> None:
    for experts, why in (([(0, e) for e in range(8)], "at most"), ([(0, 99)], "no expert 99 of layer 0")):
        with pytest.raises(InvalidRequest, match=why) as refusal:
            await offloaded.control_cache("pin", experts)
        assert refusal.value.param == "experts"
    assert await top_tier(offloaded) == set()


async def test_an_aborted_request_ends_and_its_reader_is_told(offloaded: AsyncEngine) -> None:
    params = SamplingParams(temperature=0.0, max_tokens=80, ignore_eos=True)
    outputs = []
    async for output in offloaded.generate("chatcmpl-0123456789-0", [1, 2], params):
        outputs.append(output)
        if len(outputs) == 1:
            assert offloaded.abort("chatcmpl-0123456789") == 1
    assert outputs[-1].finish_reason == "abort"
    assert offloaded.abort("chatcmpl-0123456789") == 0
    await top_tier(offloaded)
    assert offloaded.stats().num_running == 0


async def test_the_server_tells_what_it_is_and_no_key(admin: httpx.AsyncClient) -> None:
    response = await admin.get("/admin/server")
    told = response.json()
    assert (told["state"], told["model"]["name"], told["served_names"]) == ("ready", "fake", ["fake", "org/alias"])
    assert told["settings"]["max_body_nbytes"] == 16 * 1024**2
    assert told["stats"]["num_running"] == 0
    assert "key" not in response.text


async def test_the_cache_is_controlled_over_http(admin: httpx.AsyncClient, engine: FakeEngine) -> None:
    asked: list[tuple[str, Any]] = [
        ("reset", None),
        ("warm", {"experts": [[0, 1]]}),
        ("warm", {}),
        ("pin", {"experts": []}),
    ]
    for action, body in asked:
        response = await admin.post(f"/admin/cache/{action}", json=body)
        assert (response.status_code, response.json()) == (200, {"num_experts": 3})
    assert engine.controlled == [("reset", None), ("warm", [(0, 1)]), ("warm", None), ("pin", [])]
    for body in ({"experts": [[9, 1]]}, {"experts": [[1]]}, {"experts": [[1, -1]]}, {}):
        response = await admin.post("/admin/cache/pin", json=body)
        assert (response.status_code, response.json()["error"]["param"].partition("[")[0]) == (400, "experts")


async def test_an_abort_over_http_names_the_answer(admin: httpx.AsyncClient, engine: FakeEngine) -> None:
    done = (await admin.post("/v1/completions", json={"prompt": "hi"})).json()
    engine.seen[0] = (done["id"], *engine.seen[0][1:])
    response = await admin.post("/admin/abort", json={"request_id": done["id"]})
    assert (response.status_code, response.json()) == (200, {"num_aborted": 1})
    missing = await admin.post("/admin/abort", json={"request_id": "chatcmpl-of-somebody-else"})
    assert (missing.status_code, missing.json()["error"]["code"]) == (404, "request_not_found")
    assert (await admin.post("/admin/abort", json={"request_id": "chatcmpl"})).status_code == 400


async def test_without_a_key_only_this_machine_may(client: httpx.AsyncClient) -> None:
    for method, path in (("GET", "server"), ("POST", "abort"), ("POST", "cache/reset"), ("POST", "cache/pin")):
        assert (await client.request(method, f"/admin/{path}")).status_code == 403
