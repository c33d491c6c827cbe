"""server/metrics.py and server/engine_metrics.py: names, types, labels and buckets as API.md has them."""

from __future__ import annotations

from collections.abc import Callable

import httpx
import pytest
from prometheus_client.metrics_core import Metric
from prometheus_client.parser import text_string_to_metric_families

from cache.stats import CacheStats, PhaseStats, PrefetchStats
from engine.errors import EngineOverloaded
from engine.messages import EngineStats
from tests.server.fake_engine import FakeEngine, Script, Token

COMMON = ("engine", "model_name")
GOLDEN: dict[str, tuple[str, tuple[str, ...]]] = {
    "foregate_requests": ("counter", ("code", "endpoint", "finish_reason", "stream")),
    "foregate_admission_rejections": ("counter", ("reason",)),
    "foregate_time_to_first_token_seconds": ("histogram", ()),
    "foregate_inter_token_latency_seconds": ("histogram", ()),
    "foregate_e2e_request_latency_seconds": ("histogram", ()),
    "foregate_expert_cache_queries": ("counter", ("phase", "tier")),
    "foregate_expert_cache_hits": ("counter", ("phase", "tier")),
    "foregate_expert_fetches": ("counter", ("source",)),
    "foregate_expert_prefetch": ("counter", ("outcome",)),
    "foregate_link_bandwidth_bytes_per_second": ("gauge", ("link",)),
    "foregate_expert_transfer_bytes": ("counter", ("kind", "link")),
    "foregate_expert_stall_seconds": ("counter", ("phase",)),
    "foregate_expert_evictions": ("counter", ("reason",)),
    "foregate_expert_cache_slots": ("gauge", ("tier",)),
    "foregate_expert_cache_slots_used": ("gauge", ("tier",)),
    "foregate_expert_cache_capacity_bytes": ("gauge", ("tier",)),
    "foregate_expert_cache_used_bytes": ("gauge", ("tier",)),
    "foregate_num_requests_running": ("gauge", ()),
    "foregate_num_requests_waiting": ("gauge", ()),
    "foregate_kv_cache_blocks": ("gauge", ()),
    "foregate_kv_cache_blocks_used": ("gauge", ()),
    "foregate_prefix_cache_queries": ("counter", ()),
    "foregate_prefix_cache_hits": ("counter", ()),
    "foregate_prompt_tokens": ("counter", ()),
    "foregate_generation_tokens": ("counter", ()),
    "foregate_preemptions": ("counter", ()),
    "foregate_scheduler_passes_over": ("counter", ()),
    "foregate_engine_steps": ("counter", ()),
    "foregate_engine_state": ("gauge", ("state",)),
    "foregate_engine_last_step_age_seconds": ("gauge", ()),
    "vllm:time_to_first_token_seconds": ("histogram", ()),
    "vllm:inter_token_latency_seconds": ("histogram", ()),
    "vllm:e2e_request_latency_seconds": ("histogram", ()),
    "vllm:num_requests_running": ("gauge", ()),
    "vllm:num_requests_waiting": ("gauge", ()),
    "vllm:kv_cache_usage_perc": ("gauge", ()),
}
BUCKETS = {
    "time_to_first_token_seconds": ".001 .005 .01 .02 .04 .06 .08 .1 .25 .5 .75 1 2.5 5 7.5 10 20 40 80 160 640 2560",
    "inter_token_latency_seconds": ".001 .0025 .005 .01 .025 .05 .075 .1 .15 .2 .3 .4 .5 .75 1 2.5 5 7.5 10 20 40 80",
    "e2e_request_latency_seconds": ".3 .5 .8 1 1.5 2 2.5 5 10 15 20 30 40 50 60 120 240 480 960 1920 7680",
}
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


async def test_names_types_and_labels_are_the_contracts(client: httpx.AsyncClient, engine: FakeEngine) -> None:
    engine.script = Script(refusal=EngineOverloaded("full"))
    await client.post("/v1/chat/completions", json=CHAT)
    families = await scrape(client)
    found = {
        name: (family.type, tuple(sorted(set(family.samples[0].labels) - {*COMMON, "le"})))
        for name, family in families.items()
    }
    assert found == GOLDEN
    for family in families.values():
        for sample in family.samples:
            assert (sample.labels["model_name"], sample.labels["engine"]) == ("fake", "0")


@pytest.mark.parametrize("prefix", ["foregate_", "vllm:"])
async def test_buckets_are_the_contracts(client: httpx.AsyncClient, prefix: str) -> None:
    families = await scrape(client)
    for name, bounds in BUCKETS.items():
        found = [
            float(sample.labels["le"]) for sample in families[prefix + name].samples if sample.name.endswith("_bucket")
        ]
        assert found == [*map(float, bounds.split()), float("inf")]


async def test_the_engines_counters_are_told_as_they_are(client: httpx.AsyncClient, engine: FakeEngine) -> None:
    engine.stats_to_tell = EngineStats(
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
        expert_cache=CacheStats(
            prefill=PhaseStats(queries=20, hits=5, stall_s=1.5),
            decode=PhaseStats(queries=10, hits=9, stall_s=0.25),
            fetches=16,
            host_hits=3,
            prefetch={
                1: PrefetchStats(useful=4, late=1, wasted=2),
                2: PrefetchStats(useful=1, cancelled=4),
            },
            bandwidth=1e9,
            fetched_nbytes=65536,
            fetched_ahead_nbytes=4096,
            evictions=2,
            num_slots=8,
            num_slots_used=6,
            slot_nbytes=4096,
        ),
    )
    families = await scrape(client)
    assert values(families["foregate_expert_cache_queries"], "phase", "tier") == {
        ("prefill", "top"): 20,
        ("decode", "top"): 10,
    }
    assert values(families["foregate_expert_cache_hits"], "phase") == {("prefill",): 5, ("decode",): 9}
    assert values(families["foregate_expert_stall_seconds"], "phase") == {("prefill",): 1.5, ("decode",): 0.25}
    assert values(families["foregate_expert_fetches"], "source") == {("disk",): 13, ("host",): 3}
    assert values(families["foregate_expert_prefetch"], "outcome") == {
        ("used",): 5,
        ("late",): 1,
        ("wasted",): 2,
        ("cancelled",): 4,
    }
    assert values(families["foregate_link_bandwidth_bytes_per_second"], "link") == {("disk",): 1e9}
    assert values(families["foregate_expert_transfer_bytes"], "link", "kind") == {
        ("disk", "demand"): 61440,
        ("disk", "prefetch"): 4096,
    }
    assert values(families["foregate_expert_cache_capacity_bytes"], "tier") == {("top",): 32768}
    assert values(families["foregate_expert_cache_used_bytes"], "tier") == {("top",): 24576}
    assert values(families["foregate_engine_last_step_age_seconds"]) == {(): 0.5}
    assert values(families["foregate_engine_state"], "state")[("ready",)] == 1
    assert sum(values(families["foregate_engine_state"], "state").values()) == 1
    assert values(families["vllm:num_requests_running"]) == {(): 3}
    assert values(families["vllm:kv_cache_usage_perc"]) == {(): 0.5}


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
    assert values(families["foregate_admission_rejections"], "reason") == {("queue_full",): 1, ("loading",): 1}
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
