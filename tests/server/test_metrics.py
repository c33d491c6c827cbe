"""server/metrics.py and server/engine_metrics.py: names, types, labels and buckets as API.md has them."""

from __future__ import annotations

import asyncio
import re
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import httpx
import pytest
from prometheus_client.metrics_core import Metric
from prometheus_client.parser import text_string_to_metric_families

from cache.histogram import HistogramStats
from cache.stats import (
    HELD_S,
    READ_S,
    RECALL,
    UNIQUE_EXPERTS,
    CacheStats,
    LinkStats,
    OracleStats,
    PhaseStats,
    PrefetchStats,
)
from engine.errors import EngineOverloaded
from engine.messages import BATCH_TOKENS, STEP_S, EngineStats
from server.context import Lifecycle
from server.metrics import REJECTIONS, ServerMetrics
from tests.server.fake_engine import FakeEngine, Script, Token

COMMON = ("engine", "model_name")
GOLDEN = Path(__file__).with_name("metrics.golden")
CHAT = {"messages": [{"role": "user", "content": "hi"}]}


async def scrape(client: httpx.AsyncClient) -> dict[str, Metric]:
    response = await client.get("/metrics")
    assert response.status_code == 200
    assert response.headers["content-type"].startswith("text/plain")
    return {family.name: family for family in text_string_to_metric_families(response.text)}


def values(family: Metric, *names: str) -> dict[tuple[str, ...], float]:
    return {
        tuple(sample.labels[name] for name in names): sample.value
        for sample in family.samples
        if not sample.name.endswith(("_bucket", "_sum"))
    }


def some(bounds: Sequence[float]) -> HistogramStats:
    """As many counts as there are buckets: 1, 2, 3..."""
    return HistogramStats(list(range(1, len(bounds) + 2)), 2.5)


TOLD = EngineStats(
    state="ready",
    num_running=3,
    num_waiting=4,
    kv_blocks=10,
    kv_blocks_used=5,
    prompt_tokens_total=100,
    output_tokens_total=50,
    prefix_queries_total=80,
    prefix_hits_total=16,
    last_step_age_s=0.5,
    step_s={"attention": some(STEP_S), "stall": some(STEP_S)},
    batch_tokens=some(BATCH_TOKENS),
    restarts_total=2,
    expert_cache=CacheStats(
        prefill=PhaseStats(queries=20, hits=5, stall_s=1.5),
        decode=PhaseStats(queries=10, hits=9, stall_s=0.25),
        host_decode=PhaseStats(queries=1, hits=1),
        sources={"top": 14, "prefetch": 5, "host": 3, "disk": 8, "cpu_compute": 0},
        links={
            "disk": LinkStats(
                demand_nbytes=61440, prefetch_nbytes=4096, bandwidth=1e9, demand_s=some(READ_S), prefetch_s=some(READ_S)
            ),
            "host": LinkStats(demand_nbytes=8192),
        },
        host_slots=16,
        host_slots_used=12,
        prefetch={
            1: PrefetchStats(useful=4, late=1, wasted=2, recall=some(RECALL)),
            2: PrefetchStats(useful=1, cancelled=4),
        },
        evictions_for={"demand": 2, "prefetch": 1},
        residency_s=some(HELD_S),
        idle_s=some(HELD_S),
        reuse_gap_s=some(HELD_S),
        unique_experts=some(UNIQUE_EXPERTS),
        oracle=OracleStats(queries=60, hits=30, oracle_hits=40),
        read_errors=1,
        num_slots=8,
        num_slots_used=6,
        slot_nbytes=4096,
    ),
)


@pytest.fixture
async def told(client: httpx.AsyncClient, engine: FakeEngine) -> dict[str, Metric]:
    engine.stats_to_tell = TOLD
    await client.post("/v1/chat/completions", json=CHAT)
    return await scrape(client)


def described(family: Metric) -> str:
    """One line: name, type, own labels, buckets."""
    labels = sorted(set(family.samples[0].labels) - {*COMMON, "le"})
    bounds = dict.fromkeys(sample.labels["le"] for sample in family.samples if "le" in sample.labels)
    return " ".join([family.name, family.type, f"{{{','.join(labels)}}}", *bounds])


async def test_names_types_labels_and_buckets_are_the_contracts(
    connect: Callable[..., httpx.AsyncClient], engine: FakeEngine
) -> None:
    """To change the contract, change the file: dashboards, alerts and docs/metrics.md go by it."""
    lifecycle = Lifecycle()
    lifecycle.loaded()
    engine.stats_to_tell = TOLD
    client = connect(lifecycle=lifecycle)
    await client.post("/v1/chat/completions", json=CHAT)
    families = await scrape(client)
    assert sorted(map(described, families.values())) == GOLDEN.read_text().splitlines()
    for family in families.values():
        for sample in family.samples:
            assert (sample.labels["model_name"], sample.labels["engine"]) == ("fake", "0")


async def test_the_documentation_tells_of_every_family_and_of_no_other(told: dict[str, Metric]) -> None:
    text = (Path(__file__).parents[2] / "docs" / "metrics.md").read_text()
    documented = set(re.findall(r"`((?:foregate_|vllm:)[a-z0-9_]+)", text))
    exposed = {f"{name}_total" if family.type == "counter" else name for name, family in told.items()}
    assert exposed | {"foregate_startup_seconds"} == documented


async def test_buckets_grow_and_end_with_the_count(told: dict[str, Metric]) -> None:
    samples = [s for s in told["foregate_expert_transfer_seconds"].samples if s.labels.get("kind") == "prefetch"]
    disk = [s for s in samples if s.labels["link"] == "disk"]
    counts = [s.value for s in disk if s.name.endswith("_bucket")]
    assert counts == [sum(range(1, n + 2)) for n in range(len(READ_S) + 1)]
    assert [s.value for s in disk if s.name.endswith(("_count", "_sum"))] == [counts[-1], 2.5]


async def test_the_engines_counters_are_told_as_they_are(told: dict[str, Metric]) -> None:
    families = told
    assert values(families["foregate_expert_cache_queries"], "phase", "tier") == {
        ("prefill", "top"): 20,
        ("decode", "top"): 10,
        ("prefill", "host"): 0,
        ("decode", "host"): 1,
    }
    assert values(families["foregate_expert_cache_hits"], "phase", "tier") == {
        ("prefill", "top"): 5,
        ("decode", "top"): 9,
        ("prefill", "host"): 0,
        ("decode", "host"): 1,
    }
    assert values(families["foregate_expert_stall_seconds"], "phase") == {("prefill",): 1.5, ("decode",): 0.25}
    assert values(families["foregate_expert_fetches"], "source") == {
        ("top",): 14,
        ("prefetch",): 5,
        ("host",): 3,
        ("disk",): 8,
        ("cpu_compute",): 0,
    }
    assert values(families["foregate_expert_prefetch"], "outcome") == {
        ("used",): 5,
        ("late",): 1,
        ("wasted",): 2,
        ("cancelled",): 4,
    }
    assert values(families["foregate_expert_evictions"], "reason") == {("demand",): 2, ("prefetch",): 1}
    assert values(families["foregate_link_bandwidth_bytes_per_second"], "link") == {("disk",): 1e9}
    assert values(families["foregate_expert_transfer_bytes"], "link", "kind") == {
        ("disk", "demand"): 61440,
        ("disk", "prefetch"): 4096,
        ("host", "demand"): 8192,
        ("host", "prefetch"): 0,
    }
    assert values(families["foregate_expert_cache_capacity_bytes"], "tier") == {("top",): 32768, ("host",): 65536}
    assert values(families["foregate_expert_cache_used_bytes"], "tier") == {("top",): 24576, ("host",): 49152}
    for name, value in (("queries", 60), ("realised_hits", 30), ("hits", 40)):
        assert values(families[f"foregate_expert_cache_oracle_{name}"]) == {(): value}
    assert values(families["foregate_engine_restarts"]) == {(): 2}
    assert values(families["foregate_engine_last_step_age_seconds"]) == {(): 0.5}
    assert values(families["foregate_engine_state"], "state")[("ready",)] == 1
    assert sum(values(families["foregate_engine_state"], "state").values()) == 1
    assert values(families["vllm:num_requests_running"]) == {(): 3}
    assert values(families["vllm:kv_cache_usage_perc"]) == {(): 0.5}


async def test_a_server_without_experts_or_requests_tells_zeros(client: httpx.AsyncClient) -> None:
    families = await scrape(client)
    assert values(families["foregate_expert_cache_queries"], "phase", "tier") == {
        ("prefill", "top"): 0,
        ("decode", "top"): 0,
    }
    assert values(families["foregate_admission_rejections"], "reason") == {(reason,): 0 for reason in REJECTIONS}
    assert {s.value for s in families["foregate_step_seconds"].samples} == {0.0}


async def test_the_event_loops_lag_is_measured(connect: Callable[..., httpx.AsyncClient], engine: FakeEngine) -> None:
    metrics = ServerMetrics("fake", engine.stats, vllm_names=False)
    watching = asyncio.ensure_future(metrics.watch_event_loop(interval_s=0.01))
    await asyncio.sleep(0.1)
    time.sleep(0.3)
    await asyncio.sleep(0.05)
    watching.cancel()
    families = {family.name: family for family in metrics.registry.collect()}
    samples = families["foregate_event_loop_lag_seconds"].samples
    counts = {s.labels["le"]: s.value for s in samples if s.name.endswith("_bucket")}
    assert counts["+Inf"] > counts["0.1"] > 0


async def test_an_answer_is_timed_and_counted(client: httpx.AsyncClient, engine: FakeEngine) -> None:
    engine.script = Script([Token("a"), Token(""), Token("b")], finish_reason="length")
    await client.post("/v1/chat/completions", json=CHAT)
    await client.post("/v1/chat/completions", json={**CHAT, "stream": True})
    families = await scrape(client)
    labels = ("endpoint", "code", "finish_reason", "stream")
    assert values(families["foregate_requests"], *labels) == {
        ("/v1/chat/completions", "200", "length", "false"): 1,
        ("/v1/chat/completions", "200", "length", "true"): 1,
    }
    for name, count in (("time_to_first_token", 2), ("inter_token_latency", 4), ("e2e_request_latency", 2)):
        assert values(families[f"foregate_{name}_seconds"])[()] == count
        assert values(families[f"vllm:{name}_seconds"])[()] == count


async def test_refusals_are_counted_by_reason_and_code(client: httpx.AsyncClient, engine: FakeEngine) -> None:
    engine.script = Script(refusal=EngineOverloaded("full"))
    await client.post("/v1/chat/completions", json=CHAT)
    engine.state = "loading"
    await client.post("/v1/chat/completions", json=CHAT)
    await client.get("/v1/secret-path-0815")
    families = await scrape(client)
    counted = values(families["foregate_admission_rejections"], "reason")
    assert {reason: num for (reason,), num in counted.items() if num} == {"queue_full": 1, "loading": 1}
    assert values(families["foregate_requests"], "endpoint", "code") == {
        ("/v1/chat/completions", "503"): 2,
        ("other", "404"): 1,
    }


async def test_a_failed_generation_is_counted_as_an_error(client: httpx.AsyncClient, engine: FakeEngine) -> None:
    engine.script = Script(finish_reason="error", error="broken")
    await client.post("/v1/chat/completions", json=CHAT)
    await client.post("/v1/chat/completions", json={**CHAT, "stream": True})
    counted = values((await scrape(client))["foregate_requests"], "code", "finish_reason", "stream")
    assert counted == {("500", "error", "false"): 1, ("200", "error", "true"): 1}


async def test_vllms_names_can_be_turned_off(connect: Callable[..., httpx.AsyncClient]) -> None:
    families = await scrape(connect(metrics_compat="none"))
    assert not [name for name in families if name.startswith("vllm:")]


async def test_openmetrics_is_spoken_when_asked_for(client: httpx.AsyncClient) -> None:
    response = await client.get("/metrics", headers={"accept": "application/openmetrics-text; version=1.0.0"})
    assert response.headers["content-type"].startswith("application/openmetrics-text")
    assert response.text.endswith("# EOF\n")
