"""`CacheStats` as Prometheus families: the tiers of experts, what moves between them and how well that is foretold."""

from __future__ import annotations

from collections.abc import Iterator

from prometheus_client.metrics_core import Metric

from cache.stats import HELD_S, READ_S, RECALL, UNIQUE_EXPERTS, CacheStats, Link, LinkStats
from server.families import Families


def expert_families(stats: CacheStats, make: Families) -> Iterator[Metric]:
    yield from _tiers(stats, make)
    yield from _transfers(stats, make)
    yield from _foretelling(stats, make)
    yield from _evictions(stats, make)


def _tiers(stats: CacheStats, make: Families) -> Iterator[Metric]:
    phases = {("prefill", "top"): stats.prefill, ("decode", "top"): stats.decode}
    sizes: dict[tuple[str, ...], tuple[int, int]] = {("top",): (stats.num_slots, stats.num_slots_used)}
    if stats.host_slots:
        phases |= {("prefill", "host"): stats.host_prefill, ("decode", "host"): stats.host_decode}
        sizes[("host",)] = (stats.host_slots, stats.host_slots_used)
    yield make.counter(
        "foregate_expert_cache_queries",
        "Experts that a layer call asked a tier for: the host tier for what the top tier had to wait for",
        {labels: of.queries for labels, of in phases.items()},
        *("phase", "tier"),
    )
    yield make.counter(
        "foregate_expert_cache_hits",
        "Of these, experts that were in the tier",
        {labels: of.hits for labels, of in phases.items()},
        *("phase", "tier"),
    )
    oracle = stats.oracle
    for name, text, value in (
        ("oracle_queries", "Experts asked for in the sampled windows of the oracle", oracle.queries),
        ("oracle_realised_hits", "Of these, hits of the cache as it was", oracle.hits),
        (
            "oracle_hits",
            "Of these, hits that evictions knowing the future (Belady) would have had from the same start; windows are "
            "sampled, of up to 128 steps, their first half is counted, the rest foreseen",
            oracle.oracle_hits,
        ),
    ):
        yield make.counter(f"foregate_expert_cache_{name}", text, value)
    yield make.counter(
        "foregate_expert_fetches",
        "Experts that layer calls got, by where from: the top tier, read ahead, host memory, disk, or computed where "
        "they lay",
        {(source,): num for source, num in stats.sources.items()},
        "source",
    )
    yield make.counter(
        "foregate_expert_stall_seconds",
        "Time in which compute waited for experts",
        {("prefill",): stats.prefill.stall_s, ("decode",): stats.decode.stall_s},
        "phase",
    )
    yield make.counter("foregate_expert_waves", "Layer calls whose experts did not fit at once", stats.waves)
    for name, text, which, scale in (
        ("slots", "Experts that the tier has room for", 0, 1),
        ("slots_used", "Experts in the tier", 1, 1),
        ("capacity_bytes", "Size of the tier", 0, stats.slot_nbytes),
        ("used_bytes", "Bytes of experts in the tier", 1, stats.slot_nbytes),
    ):
        values = {tier: float(of[which] * scale) for tier, of in sizes.items()}
        yield make.gauge(f"foregate_expert_cache_{name}", text, values, "tier")
    yield make.histogram(
        "foregate_batch_unique_experts",
        "Distinct experts that a layer call asked for",
        UNIQUE_EXPERTS,
        stats.unique_experts,
    )


def _transfers(stats: CacheStats, make: Families) -> Iterator[Metric]:
    links: dict[Link, LinkStats] = {"disk": LinkStats()}
    if stats.host_slots:
        links["host"] = LinkStats()
    links |= stats.links
    yield make.counter(
        "foregate_expert_transfer_bytes",
        "Bytes of experts that came over a link, for a layer call that waited or ahead of one",
        {
            key: value
            for link, of in links.items()
            for key, value in (((link, "demand"), of.demand_nbytes), ((link, "prefetch"), of.prefetch_nbytes))
        },
        *("link", "kind"),
    )
    yield make.histogram(
        "foregate_expert_transfer_seconds",
        "Of one read, of a record or of neighbours, from its begin until all is in place and verified",
        READ_S,
        {
            key: value
            for link, of in links.items()
            for key, value in (((link, "demand"), of.demand_s), ((link, "prefetch"), of.prefetch_s))
        },
        *("link", "kind"),
    )
    yield make.gauge(
        "foregate_link_bandwidth_bytes_per_second",
        "Of a link while it works, measured and averaged; none before the first 4 MiB",
        {(link,): of.bandwidth for link, of in links.items() if of.bandwidth > 0},
        "link",
    )
    yield make.counter(
        "foregate_expert_read_retries", "Reads of a record that failed and were tried again", stats.read_retries
    )
    yield make.counter(
        "foregate_expert_read_errors", "Records that could not be read; their requests fail", stats.read_errors
    )


def _foretelling(stats: CacheStats, make: Families) -> Iterator[Metric]:
    of_all = stats.prefetch.values()
    yield make.counter(
        "foregate_expert_prefetch",
        "Experts read ahead, by what became of them: in place when asked for, still on their way, evicted unused, or "
        "given up before the read began",
        {
            ("used",): sum(of.useful for of in of_all),
            ("late",): sum(of.late for of in of_all),
            ("wasted",): sum(of.wasted for of in of_all),
            ("cancelled",): sum(of.cancelled for of in of_all),
        },
        "outcome",
    )
    yield make.histogram(
        "foregate_expert_prefetch_recall",
        "Share of a layer call's experts that had been foretold so many layers ahead",
        RECALL,
        {(str(distance),): of.recall for distance, of in stats.prefetch.items()},
        "distance",
    )


def _evictions(stats: CacheStats, make: Families) -> Iterator[Metric]:
    yield make.counter(
        "foregate_expert_evictions",
        "Experts that left the top tier to make room for one that was waited for, or read ahead",
        {(reason,): num for reason, num in stats.evictions_for.items()},
        "reason",
    )
    for name, text, values in (
        ("residency", "From an expert's arrival in the top tier to its eviction", stats.residency_s),
        ("idle_before_evict", "From an expert's last use to its eviction", stats.idle_s),
        (
            "reuse_gap",
            "From one use of an expert to the next, of a random one in sixteen layer calls",
            stats.reuse_gap_s,
        ),
    ):
        yield make.histogram(f"foregate_expert_{name}_seconds", text, HELD_S, values)
