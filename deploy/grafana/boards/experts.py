"""What the expert cache finds, waits for, reads ahead and gives up."""

from __future__ import annotations

from deploy.grafana.panels import Panel, Query, Row, mean, quantiles, rate, share

ROWS = (
    Row(
        "Hits",
        (
            Panel(
                "Hit rate",
                "Share of the experts asked for that were there, by phase and tier. The host tier is asked for what the top tier had to wait for.",
                "percentunit",
                (
                    Query(
                        share(
                            "foregate_expert_cache_hits_total", "foregate_expert_cache_queries_total", "phase", "tier"
                        ),
                        "{{phase}} {{tier}}",
                    ),
                ),
                max=1,
            ),
            Panel(
                "Against an oracle",
                "On the same sampled windows of routing: the cache as it was, and what evictions that know the future would have hit without reading ahead. "
                "A large gap means that a better policy would help, a small one that only more memory will.",
                "percentunit",
                (
                    Query(
                        share(
                            "foregate_expert_cache_oracle_realised_hits_total",
                            "foregate_expert_cache_oracle_queries_total",
                        ),
                        "realised",
                    ),
                    Query(
                        share("foregate_expert_cache_oracle_hits_total", "foregate_expert_cache_oracle_queries_total"),
                        "oracle",
                    ),
                ),
                max=1,
            ),
            Panel(
                "Where experts came from",
                "What layer calls got, a second.",
                "ops",
                (Query(rate("foregate_expert_fetches_total", "source"), "{{source}}"),),
                stacked=True,
            ),
        ),
    ),
    Row(
        "Waiting",
        (
            Panel(
                "Share of time stalled",
                "Of the steps' time, what compute spent waiting for experts, by phase.",
                "percentunit",
                (
                    Query(
                        f"{rate('foregate_expert_stall_seconds_total', 'phase')} / on () group_left {rate('foregate_step_seconds_sum')}",
                        "{{phase}}",
                    ),
                ),
                max=1,
                stacked=True,
            ),
            Panel(
                "Bytes over the links",
                "By link and kind, and what each link was measured to carry while it works.",
                "Bps",
                (
                    Query(rate("foregate_expert_transfer_bytes_total", "link", "kind"), "{{link}} {{kind}}"),
                    Query("sum by (link) (foregate_link_bandwidth_bytes_per_second{LABELS})", "{{link}} can"),
                ),
            ),
            Panel(
                "Use of the links",
                "Bytes a second as a share of the measured bandwidth. At 1 only fewer bytes help: a smaller format, more memory, a better policy.",
                "percentunit",
                (
                    Query(
                        f"{rate('foregate_expert_transfer_bytes_total', 'link')} / sum by (link) (foregate_link_bandwidth_bytes_per_second{{LABELS}})",
                        "{{link}}",
                    ),
                ),
            ),
            Panel(
                "Time of a read",
                "Of a record or neighbours, from its begin until verified: median and p99 by link and kind.",
                "s",
                (
                    Query(
                        f"histogram_quantile(0.5, {rate('foregate_expert_transfer_seconds_bucket', 'le', 'link', 'kind')})",
                        "{{link}} {{kind}} p50",
                    ),
                    Query(
                        f"histogram_quantile(0.99, {rate('foregate_expert_transfer_seconds_bucket', 'le', 'link', 'kind')})",
                        "{{link}} {{kind}} p99",
                    ),
                ),
                log=True,
                min=None,
            ),
            Panel(
                "Failed reads",
                "Tried again, and given up: then requests fail.",
                "ops",
                (
                    Query(rate("foregate_expert_read_retries_total"), "retries"),
                    Query(rate("foregate_expert_read_errors_total"), "errors"),
                ),
            ),
            Panel(
                "Experts a layer call needs",
                "Distinct ones: what a batch shares.",
                "none",
                (
                    *quantiles("foregate_batch_unique_experts", 0.5, 0.95),
                    Query(mean("foregate_batch_unique_experts"), "mean"),
                ),
            ),
        ),
    ),
    Row(
        "Reading ahead",
        (
            Panel(
                "What became of it",
                "Experts read ahead, by outcome.",
                "ops",
                (Query(rate("foregate_expert_prefetch_total", "outcome"), "{{outcome}}"),),
                stacked=True,
            ),
            Panel(
                "Foretold",
                "Mean share of a layer call's experts that had been foretold, by layers ahead. None while nothing is foretold.",
                "percentunit",
                (Query(mean("foregate_expert_prefetch_recall", "distance"), "{{distance}} ahead"),),
                max=1,
            ),
            Panel(
                "Share of bytes read ahead",
                "Of all that came over each link.",
                "percentunit",
                (
                    Query(
                        'sum by (link) (rate(foregate_expert_transfer_bytes_total{LABELS,kind="prefetch"}[$__rate_interval])) / '
                        + rate("foregate_expert_transfer_bytes_total", "link"),
                        "{{link}}",
                    ),
                ),
                max=1,
            ),
        ),
    ),
    Row(
        "Staying",
        (
            Panel(
                "Evictions",
                "By what the room was made for.",
                "ops",
                (Query(rate("foregate_expert_evictions_total", "reason"), "for {{reason}}"),),
                6,
            ),
            Panel(
                "Residency against reuse",
                "Medians: how long an expert stays, how long it had lain unused when it went, and after how long one is used again. "
                "Where reuse is well below residency the cache holds what is used; where it is above, experts leave before they are wanted again.",
                "s",
                (
                    *(Query(q.expr, "residency") for q in quantiles("foregate_expert_residency_seconds", 0.5)),
                    *(
                        Query(q.expr, "idle before evicted")
                        for q in quantiles("foregate_expert_idle_before_evict_seconds", 0.5)
                    ),
                    *(Query(q.expr, "reuse gap") for q in quantiles("foregate_expert_reuse_gap_seconds", 0.5)),
                    *(Query(q.expr, "reuse gap p95") for q in quantiles("foregate_expert_reuse_gap_seconds", 0.95)),
                ),
                log=True,
                min=None,
            ),
            Panel(
                "Tiers",
                "Bytes of experts, and room for them.",
                "bytes",
                (
                    Query("sum by (tier) (foregate_expert_cache_used_bytes{LABELS})", "{{tier}} used"),
                    Query("sum by (tier) (foregate_expert_cache_capacity_bytes{LABELS})", "{{tier}} room"),
                ),
                5,
            ),
            Panel(
                "Slots and waves",
                "Share of the slots that are taken; layer calls a second whose experts did not fit at once: the cache is too small for the batch.",
                "none",
                (
                    Query(
                        "sum by (tier) (foregate_expert_cache_slots_used{LABELS}) / sum by (tier) (foregate_expert_cache_slots{LABELS})",
                        "{{tier}} taken",
                    ),
                    Query(rate("foregate_expert_waves_total"), "waves/s"),
                ),
                5,
            ),
        ),
    ),
)
