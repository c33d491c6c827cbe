"""`EngineStats` as Prometheus families. A pure function of one snapshot: the engine knows no metrics library."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import get_args

from prometheus_client.metrics_core import Metric

from cache.histogram import HistogramStats
from engine.messages import BATCH_TOKENS, STEP_S, EngineState, EngineStats, StepPart
from server.expert_metrics import expert_families
from server.families import Families


def engine_families(stats: EngineStats, labels: Mapping[str, str]) -> Iterator[Metric]:
    """`labels`: those that every sample has."""
    make = Families(labels)
    yield from expert_families(stats.expert_cache, make)
    yield from _scheduler(stats, make)
    yield make.gauge(
        "foregate_engine_state",
        "1 for the state that the engine is in",
        {(state,): float(state == stats.state) for state in get_args(EngineState)},
        "state",
    )
    yield make.gauge(
        "foregate_engine_last_step_age_seconds", "Time since the last step; 0 with nothing to do", stats.last_step_age_s
    )
    yield make.counter(
        "foregate_engine_restarts", "Times that the engine's process was started anew", stats.restarts_total
    )


def _scheduler(stats: EngineStats, make: Families) -> Iterator[Metric]:
    yield make.histogram(
        "foregate_step_seconds",
        "Of each step, the time of each of its parts; together they are the step",
        STEP_S,
        {(part,): stats.step_s.get(part, HistogramStats()) for part in get_args(StepPart)},
        "part",
    )
    yield make.histogram("foregate_batch_tokens", "Tokens in a step", BATCH_TOKENS, stats.batch_tokens)
    yield make.counter("foregate_engine_steps", "Steps of the engine", stats.steps_total)
    yield make.gauge("foregate_num_requests_running", "Requests in the running batch", stats.num_running)
    yield make.gauge("foregate_num_requests_waiting", "Requests in the queue", stats.num_waiting)
    yield make.gauge("foregate_kv_cache_blocks", "Blocks of KV memory", stats.kv_blocks)
    yield make.gauge("foregate_kv_cache_blocks_used", "Blocks held by requests", stats.kv_blocks_used)
    yield make.counter("foregate_prefix_cache_queries", "Prompt tokens looked up", stats.prefix_queries_total)
    yield make.counter("foregate_prefix_cache_hits", "Prompt tokens found", stats.prefix_hits_total)
    yield make.counter("foregate_prompt_tokens", "Tokens of prompts that came", stats.prompt_tokens_total)
    yield make.counter(
        "foregate_computed_prompt_tokens",
        "Tokens of prompts that steps computed; those found in the prefix cache are not among them",
        stats.computed_prompt_tokens_total,
    )
    yield make.counter("foregate_generation_tokens", "Tokens generated", stats.output_tokens_total)
    yield make.counter("foregate_preemptions", "Requests set back for lack of KV memory", stats.preemptions_total)
    yield make.counter(
        "foregate_scheduler_passes_over",
        "Requests left out of a turn for others that fit the cached experts better",
        stats.passes_over_total,
    )


def vllm_gauges(stats: EngineStats, labels: Mapping[str, str]) -> Iterator[Metric]:
    """The gauges that autoscalers and gateways read under vLLM's names."""
    make = Families(labels)
    usage = stats.kv_blocks_used / stats.kv_blocks if stats.kv_blocks else 0.0
    yield make.gauge("vllm:num_requests_running", "Requests in the running batch", stats.num_running)
    yield make.gauge("vllm:num_requests_waiting", "Requests in the queue", stats.num_waiting)
    yield make.gauge("vllm:kv_cache_usage_perc", "Share of KV blocks held by requests, 0 to 1", usage)
