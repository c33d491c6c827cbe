"""`EngineStats` as Prometheus families. A pure function of one snapshot: the engine knows no metrics library."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import get_args

from prometheus_client.metrics_core import CounterMetricFamily, GaugeMetricFamily, Metric

from engine.messages import EngineState, EngineStats

Values = Mapping[tuple[str, ...], float]
"""Label values, after the common labels -> value."""


def engine_families(stats: EngineStats, labels: Mapping[str, str]) -> Iterator[Metric]:
    experts = stats.expert_cache
    phases = {"prefill": experts.prefill, "decode": experts.decode}

    def counter(name: str, text: str, own_labels: tuple[str, ...], values: Values) -> Metric:
        return _filled(CounterMetricFamily(f"foregate_{name}", text, labels=(*labels, *own_labels)), labels, values)

    def gauge(name: str, text: str, own_labels: tuple[str, ...], values: Values) -> Metric:
        return _filled(GaugeMetricFamily(f"foregate_{name}", text, labels=(*labels, *own_labels)), labels, values)

    yield counter(
        "expert_cache_queries",
        "Experts asked for by a layer in a step",
        ("phase", "tier"),
        {(phase, "top"): of.queries for phase, of in phases.items()},
    )
    yield counter(
        "expert_cache_hits",
        "Experts that were in the tier when asked for",
        ("phase", "tier"),
        {(phase, "top"): of.hits for phase, of in phases.items()},
    )
    yield counter(
        "expert_fetches",
        "Experts brought to the top tier",
        ("source",),
        {("disk",): experts.fetches - experts.host_hits, ("host",): experts.host_hits},
    )
    prefetched = experts.prefetch.values()
    yield counter(
        "expert_prefetch",
        "Experts read ahead, by what became of them",
        ("outcome",),
        {
            ("used",): sum(p.useful for p in prefetched),
            ("late",): sum(p.late for p in prefetched),
            ("wasted",): sum(p.wasted for p in prefetched),
            ("cancelled",): sum(p.cancelled for p in prefetched),
        },
    )
    yield gauge("link_bandwidth_bytes_per_second", "Measured while it works", ("link",), {("disk",): experts.bandwidth})
    yield counter(
        "expert_transfer_bytes",
        "Bytes of experts moved",
        ("link", "kind"),
        {
            ("disk", "demand"): experts.fetched_nbytes - experts.fetched_ahead_nbytes,
            ("disk", "prefetch"): experts.fetched_ahead_nbytes,
        },
    )
    yield counter(
        "expert_stall_seconds",
        "Time in which compute waited for experts",
        ("phase",),
        {(phase,): of.stall_s for phase, of in phases.items()},
    )
    yield counter("expert_evictions", "Experts evicted", ("reason",), {("capacity",): experts.evictions})
    yield gauge("expert_cache_slots", "Experts the tier has room for", ("tier",), {("top",): experts.num_slots})
    yield gauge("expert_cache_slots_used", "Experts in the tier", ("tier",), {("top",): experts.num_slots_used})
    yield gauge("expert_cache_capacity_bytes", "Size of the tier", ("tier",), {("top",): experts.capacity_nbytes})
    yield gauge("expert_cache_used_bytes", "Bytes of experts in it", ("tier",), {("top",): experts.used_nbytes})
    yield gauge("num_requests_running", "Requests in the running batch", (), {(): stats.num_running})
    yield gauge("num_requests_waiting", "Requests in the queue", (), {(): stats.num_waiting})
    yield gauge("kv_cache_blocks", "Blocks of KV memory", (), {(): stats.kv_blocks})
    yield gauge("kv_cache_blocks_used", "Blocks held by requests", (), {(): stats.kv_blocks_used})
    yield counter("prefix_cache_queries", "Prompt tokens looked up", (), {(): stats.prefix_queries_total})
    yield counter("prefix_cache_hits", "Prompt tokens found", (), {(): stats.prefix_hits_total})
    yield counter("prompt_tokens", "Prompt tokens processed", (), {(): stats.prompt_tokens_total})
    yield counter("generation_tokens", "Tokens generated", (), {(): stats.output_tokens_total})
    yield counter("preemptions", "Requests set back for lack of KV memory", (), {(): stats.preemptions_total})
    yield counter(
        "scheduler_passes_over",
        "Requests left out of a turn for others that fit the cached experts better",
        (),
        {(): stats.passes_over_total},
    )
    yield counter("engine_steps", "Steps of the engine", (), {(): stats.steps_total})
    yield gauge(
        "engine_state",
        "1 for the state that the engine is in",
        ("state",),
        {(state,): float(state == stats.state) for state in get_args(EngineState)},
    )
    yield gauge("engine_last_step_age_seconds", "Time since the last step", (), {(): stats.last_step_age_s})


def vllm_gauges(stats: EngineStats, labels: Mapping[str, str]) -> Iterator[Metric]:
    """The gauges that autoscalers and gateways read under vLLM's names."""
    usage = stats.kv_blocks_used / stats.kv_blocks if stats.kv_blocks else 0.0
    for name, text, value in (
        ("num_requests_running", "Requests in the running batch", stats.num_running),
        ("num_requests_waiting", "Requests in the queue", stats.num_waiting),
        ("kv_cache_usage_perc", "Share of KV blocks held by requests, 0 to 1", usage),
    ):
        yield _filled(GaugeMetricFamily(f"vllm:{name}", text, labels=tuple(labels)), labels, {(): value})


def _filled(
    family: CounterMetricFamily | GaugeMetricFamily, labels: Mapping[str, str], values: Values
) -> CounterMetricFamily | GaugeMetricFamily:
    for own, value in values.items():
        family.add_metric((*labels.values(), *own), value)
    return family
