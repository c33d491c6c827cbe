"""What runs together, where steps spend their time, and KV memory."""

from __future__ import annotations

from deploy.grafana.panels import Panel, Query, Row, mean, quantiles, rate, share

ROWS = (
    Row(
        "Requests",
        (
            Panel(
                "Running and waiting",
                "In the batch and in the queue.",
                "none",
                (
                    Query("sum(foregate_num_requests_running{LABELS})", "running"),
                    Query("sum(foregate_num_requests_waiting{LABELS})", "waiting"),
                ),
            ),
            Panel(
                "Set back", "For lack of KV memory.", "ops", (Query(rate("foregate_preemptions_total"), "preemptions"),)
            ),
            Panel(
                "Passed over",
                "Left out of a turn for requests that fit the cached experts better.",
                "ops",
                (Query(rate("foregate_scheduler_passes_over_total"), "passed over"),),
            ),
        ),
    ),
    Row(
        "Steps",
        (
            Panel(
                "Where steps spend their time",
                "Seconds of each part a second.",
                "s",
                (Query(rate("foregate_step_seconds_sum", "part"), "{{part}}"),),
                stacked=True,
            ),
            Panel(
                "A step",
                "Mean of each part.",
                "s",
                (Query(mean("foregate_step_seconds", "part"), "{{part}}"),),
                stacked=True,
            ),
            Panel(
                "Slow parts",
                "p99 of each part of a step.",
                "s",
                (Query(f"histogram_quantile(0.99, {rate('foregate_step_seconds_bucket', 'le', 'part')})", "{{part}}"),),
                log=True,
                min=None,
            ),
            Panel("Steps", "A second.", "ops", (Query(rate("foregate_engine_steps_total"), "steps"),)),
            Panel(
                "Tokens in a step",
                "What is computed together.",
                "none",
                (*quantiles("foregate_batch_tokens", 0.5, 0.95), Query(mean("foregate_batch_tokens"), "mean")),
            ),
            Panel(
                "Tokens",
                "Generated, and of prompts computed.",
                "suffix: tok/s",
                (
                    Query(rate("foregate_generation_tokens_total"), "generated"),
                    Query(rate("foregate_computed_prompt_tokens_total"), "prompts"),
                ),
            ),
        ),
    ),
    Row(
        "KV memory",
        (
            Panel(
                "Used",
                "Share of the blocks that requests hold.",
                "percentunit",
                (Query("sum(foregate_kv_cache_blocks_used{LABELS}) / sum(foregate_kv_cache_blocks{LABELS})", "used"),),
                12,
                max=1,
            ),
            Panel(
                "Found in the prefix cache",
                "Share of the prompt tokens looked up.",
                "percentunit",
                (Query(share("foregate_prefix_cache_hits_total", "foregate_prefix_cache_queries_total"), "found"),),
                12,
                max=1,
            ),
        ),
    ),
)
