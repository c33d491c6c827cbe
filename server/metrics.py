"""Prometheus families: what HTTP saw, what the engine counts (read at scrape), and vLLM's names for autoscalers."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator

from prometheus_client import CollectorRegistry, Counter, Histogram
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector
from prometheus_client.samples import Sample

from engine.messages import EngineStats, RequestOutput
from server.engine_metrics import engine_families, vllm_gauges
from server.families import Families

TTFT_BUCKETS = (
    *(0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75),
    *(1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0, 160.0, 640.0, 2560.0),
)
INTER_TOKEN_BUCKETS = (
    *(0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75),
    *(1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0),
)
E2E_BUCKETS = (
    *(0.3, 0.5, 0.8, 1.0, 1.5, 2.0, 2.5, 5.0, 10.0, 15.0, 20.0, 30.0, 40.0, 50.0, 60.0),
    *(120.0, 240.0, 480.0, 960.0, 1920.0, 7680.0),
)
LOOP_LAG_BUCKETS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0)
LABELS = ("model_name", "engine")
REJECTIONS = (
    "queue_full",
    "loading",
    "restarting",
    "draining",
    "dead",
)  # told as 0 from the start, so that the first one is seen


class ServerMetrics:
    """One application's families in a registry of its own."""

    def __init__(
        self,
        model_name: str,
        stats: Callable[[], EngineStats],
        *,
        vllm_names: bool,
        startup_s: Callable[[], float | None] = lambda: None,
    ) -> None:
        """`stats` and `startup_s` are asked at each scrape."""
        self.labels = {"model_name": model_name, "engine": "0"}
        self._requests = Counter(
            "foregate_requests",
            "HTTP requests answered; code 499: the client left first",
            (*LABELS, "endpoint", "code", "finish_reason", "stream"),
            registry=None,
        )
        self._rejections = Counter(
            "foregate_admission_rejections", "Requests turned away with 503", (*LABELS, "reason"), registry=None
        )
        for reason in REJECTIONS:
            self._rejections.labels(**self.labels, reason=reason)
        loop_lag = Histogram(
            "foregate_event_loop_lag_seconds",
            "How late the server's event loop wakes up, looked at ten times a second",
            LABELS,
            buckets=LOOP_LAG_BUCKETS,
            registry=None,
        )
        self._loop_lag = loop_lag.labels(**self.labels)
        latencies = [
            Histogram(f"foregate_{name}", text, LABELS, buckets=buckets, registry=None)
            for name, text, buckets in (
                ("time_to_first_token_seconds", "From the request's arrival to its first token", TTFT_BUCKETS),
                ("inter_token_latency_seconds", "Between one token and the next", INTER_TOKEN_BUCKETS),
                ("e2e_request_latency_seconds", "From the request's arrival to its last token", E2E_BUCKETS),
            )
        ]
        self.ttft, self.inter_token, self.e2e = (family.labels(**self.labels) for family in latencies)
        self.registry = CollectorRegistry(auto_describe=False)
        self.registry.register(_Own([self._requests, self._rejections, loop_lag, *latencies]))
        self.registry.register(_EngineCollector(self.labels, stats, startup_s, vllm_names=vllm_names))
        if vllm_names:
            self.registry.register(_Renamed(latencies))

    def count_request(self, *, endpoint: str, code: str, finish_reason: str, stream: bool) -> None:
        self._requests.labels(
            **self.labels, endpoint=endpoint, code=code, finish_reason=finish_reason, stream=str(stream).lower()
        ).inc()

    def reject(self, reason: str) -> None:
        self._rejections.labels(**self.labels, reason=reason).inc()

    async def watch_event_loop(self, interval_s: float = 0.1) -> None:
        """Measure how late the running loop wakes up, until cancelled."""
        clock = asyncio.get_running_loop().time
        while True:
            due = clock() + interval_s
            await asyncio.sleep(interval_s)
            self._loop_lag.observe(max(0.0, clock() - due))


class RequestTimer:
    """Feeds the latency histograms from the outputs of one request as they pass."""

    def __init__(self, metrics: ServerMetrics, started_s: float, clock: Callable[[], float]) -> None:
        self._metrics = metrics
        self._started_s = started_s
        self._clock = clock
        self._latest_s: dict[int, float] = {}

    def saw(self, index: int, output: RequestOutput) -> None:
        now_s = self._clock()
        num_tokens = len(output.token_ids)
        if num_tokens:
            before_s = self._latest_s.get(index)
            self._latest_s[index] = now_s
            if before_s is None:
                self._metrics.ttft.observe(now_s - self._started_s)
            else:
                for _ in range(num_tokens):
                    self._metrics.inter_token.observe((now_s - before_s) / num_tokens)
        if output.finish_reason is not None:
            self._metrics.e2e.observe(now_s - self._started_s)


class _Own(Collector):
    """Without the `_created` series, which double the size of a scrape and nothing reads."""

    def __init__(self, families: list[Counter | Histogram]) -> None:
        self._families = families

    def collect(self) -> Iterator[Metric]:
        for source in self._families:
            for family in source.collect():
                family.samples = [sample for sample in family.samples if not sample.name.endswith("_created")]
                yield family


class _Renamed(_Own):
    """The same histograms under vLLM's names."""

    def __init__(self, families: list[Histogram]) -> None:
        super().__init__(list(families))

    def collect(self) -> Iterator[Metric]:
        for family in super().collect():
            name = family.name.replace("foregate_", "vllm:")
            renamed = Metric(name, family.documentation, family.type)
            renamed.samples = [
                Sample(sample.name.replace("foregate_", "vllm:"), sample.labels, sample.value)
                for sample in family.samples
            ]
            yield renamed


class _EngineCollector(Collector):
    def __init__(
        self,
        labels: dict[str, str],
        stats: Callable[[], EngineStats],
        startup_s: Callable[[], float | None],
        *,
        vllm_names: bool,
    ) -> None:
        self._labels = labels
        self._stats = stats
        self._startup_s = startup_s
        self._vllm_names = vllm_names

    def collect(self) -> Iterator[Metric]:
        stats = self._stats()
        yield from engine_families(stats, self._labels)
        if (startup_s := self._startup_s()) is not None:
            yield Families(self._labels).gauge(
                "foregate_startup_seconds", "From the start of the server's process until it was ready", startup_s
            )
        if self._vllm_names:
            yield from vllm_gauges(stats, self._labels)
