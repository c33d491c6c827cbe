"""What clients ask for and get."""

from __future__ import annotations

from deploy.grafana.panels import Panel, Query, Row, quantiles, rate

ROWS = (
    Row(
        "Answers",
        (
            Panel(
                "By code",
                "499: the client left first.",
                "reqps",
                (Query(rate("foregate_requests_total", "code"), "{{code}}"),),
                stacked=True,
            ),
            Panel(
                "By endpoint",
                "",
                "reqps",
                (Query(rate("foregate_requests_total", "endpoint"), "{{endpoint}}"),),
                stacked=True,
            ),
            Panel(
                "By how generation ended",
                "Of the requests that generate.",
                "reqps",
                (
                    Query(
                        'sum by (finish_reason) (rate(foregate_requests_total{LABELS,finish_reason!=""}[$__rate_interval]))',
                        "{{finish_reason}}",
                    ),
                ),
                stacked=True,
            ),
            Panel(
                "Streamed",
                "Share of the requests that generate.",
                "percentunit",
                (
                    Query(
                        '(sum(rate(foregate_requests_total{LABELS,stream="true"}[$__rate_interval])) or vector(0)) / '
                        'sum(rate(foregate_requests_total{LABELS,finish_reason!=""}[$__rate_interval]))',
                        "streamed",
                    ),
                ),
                max=1,
            ),
            Panel(
                "Left and refused",
                "Shares of all requests: clients that left (499), mistakes of clients (4xx), overload (503), errors (5xx).",
                "percentunit",
                tuple(
                    Query(
                        f"(sum(rate(foregate_requests_total{{LABELS,{codes}}}[$__rate_interval])) or vector(0)) / {rate('foregate_requests_total')}",
                        name,
                    )
                    for name, codes in (
                        ("left", 'code="499"'),
                        ("4xx", 'code=~"4..",code!="499"'),
                        ("503", 'code="503"'),
                        ("5xx", 'code=~"5..",code!="503"'),
                    )
                ),
            ),
            Panel(
                "Turned away",
                "With 503, by reason.",
                "reqps",
                (Query(rate("foregate_admission_rejections_total", "reason"), "{{reason}}"),),
            ),
        ),
    ),
    Row(
        "The server itself",
        (
            Panel(
                "Lag of the event loop",
                "How late it wakes up: what every request and probe waits at least.",
                "s",
                quantiles("foregate_event_loop_lag_seconds"),
                12,
                log=True,
                min=None,
            ),
            Panel(
                "Time to first token",
                "Share of requests by how long it took, a second.",
                "s",
                (Query(rate("foregate_time_to_first_token_seconds_bucket", "le"), "{{le}}"),),
                12,
                "heatmap",
            ),
        ),
    ),
)
