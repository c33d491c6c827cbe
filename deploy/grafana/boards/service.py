"""How well requests are served, and whether they are at all."""

from __future__ import annotations

from deploy.grafana.panels import Panel, Query, Row, quantiles, rate

ROWS = (
    Row(
        "Now",
        (
            Panel(
                "State",
                "Of each engine.",
                "none",
                (Query("foregate_engine_state{LABELS} == 1", "{{instance}} {{state}}"),),
                width=4,
                kind="state",
            ),
            Panel(
                "Answers",
                "Requests answered a second, refusals among them.",
                "reqps",
                (Query(rate("foregate_requests_total")),),
                4,
                "stat",
            ),
            Panel(
                "Generated",
                "Tokens a second.",
                "suffix: tok/s",
                (Query(rate("foregate_generation_tokens_total")),),
                4,
                "stat",
            ),
            Panel(
                "Running",
                "Requests in the batch.",
                "none",
                (Query("sum(foregate_num_requests_running{LABELS})"),),
                3,
                "stat",
            ),
            Panel(
                "Waiting",
                "Requests in the queue.",
                "none",
                (Query("sum(foregate_num_requests_waiting{LABELS})"),),
                3,
                "stat",
                steps=((None, "green"), (16, "orange"), (64, "red")),
            ),
            Panel(
                "Failed",
                "Share of answers that are an error of the server's: 5xx but for refusals, and streams that ended with an error.",
                "percentunit",
                (
                    Query(
                        '(sum(rate(foregate_requests_total{LABELS,code=~"5..",code!="503"}[$__rate_interval])) or vector(0)) / '
                        + rate("foregate_requests_total")
                    ),
                ),
                3,
                "stat",
                max=1,
                steps=((None, "green"), (0.001, "orange"), (0.01, "red")),
            ),
            Panel(
                "Started in",
                "From the start of the server's process until it was ready.",
                "s",
                (Query("max(foregate_startup_seconds{LABELS})"),),
                3,
                "stat",
            ),
        ),
    ),
    Row(
        "Latency",
        (
            Panel(
                "Time to first token",
                "From a request's arrival.",
                "s",
                quantiles("foregate_time_to_first_token_seconds"),
                log=True,
                min=None,
            ),
            Panel(
                "Between tokens",
                "Of all streams.",
                "s",
                quantiles("foregate_inter_token_latency_seconds"),
                log=True,
                min=None,
            ),
            Panel(
                "Whole answers",
                "From a request's arrival to its last token.",
                "s",
                quantiles("foregate_e2e_request_latency_seconds"),
                log=True,
                min=None,
            ),
            Panel(
                "First tokens later than 2.5 s",
                "The objective is at most 5 %. The alert burns at 72 % for an hour or 30 % for six.",
                "percentunit",
                (
                    Query(
                        '1 - sum(rate(foregate_time_to_first_token_seconds_bucket{LABELS,le="2.5"}[$__rate_interval])) / '
                        + rate("foregate_time_to_first_token_seconds_count"),
                        "late",
                    ),
                ),
                max=1,
                steps=((None, "green"), (0.05, "orange"), (0.3, "red")),
            ),
            Panel(
                "Tokens",
                "Generated; prompts as they came; prompts as they were computed, the rest came from the prefix cache.",
                "suffix: tok/s",
                (
                    Query(rate("foregate_generation_tokens_total"), "generated"),
                    Query(rate("foregate_prompt_tokens_total"), "prompts"),
                    Query(rate("foregate_computed_prompt_tokens_total"), "prompts computed"),
                ),
            ),
            Panel(
                "Since the last step",
                "0 with nothing to do. What stays up is stalled.",
                "s",
                (Query("max by (instance) (foregate_engine_last_step_age_seconds{LABELS})", "{{instance}}"),),
            ),
        ),
    ),
    Row(
        "Refused and restarted",
        (
            Panel(
                "Turned away",
                "Requests answered with 503, by reason.",
                "reqps",
                (Query(rate("foregate_admission_rejections_total", "reason"), "{{reason}}"),),
                12,
            ),
            Panel(
                "Restarts of the engine",
                "In the last hour.",
                "none",
                (Query("sum by (instance) (increase(foregate_engine_restarts_total{LABELS}[1h]))", "{{instance}}"),),
                12,
            ),
        ),
    ),
)
