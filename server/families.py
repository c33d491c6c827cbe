"""Makes Prometheus families of plain numbers, each sample with the labels that all of ours have."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import accumulate

from prometheus_client.metrics_core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.utils import floatToGoString

from cache.histogram import HistogramStats

Values = Mapping[tuple[str, ...], float]
"""Values of a family's own labels -> value."""


class Families:
    """`common`: the labels that come first in every sample."""

    def __init__(self, common: Mapping[str, str]) -> None:
        self._names = tuple(common)
        self._values = tuple(common.values())

    def counter(self, name: str, text: str, values: float | Values, *labels: str) -> Metric:
        """`values`: one number, or of each combination of the own `labels`. The samples' name ends in `_total`."""
        family = CounterMetricFamily(name, text, labels=(*self._names, *labels))
        for own, value in _each(values):
            family.add_metric((*self._values, *own), value)
        return family

    def gauge(self, name: str, text: str, values: float | Values, *labels: str) -> Metric:
        family = GaugeMetricFamily(name, text, labels=(*self._names, *labels))
        for own, value in _each(values):
            family.add_metric((*self._values, *own), value)
        return family

    def histogram(
        self,
        name: str,
        text: str,
        bounds: Sequence[float],
        values: HistogramStats | Mapping[tuple[str, ...], HistogramStats],
        *labels: str,
    ) -> Metric:
        """`bounds` are those that the counts were made with."""
        family = HistogramMetricFamily(name, text, labels=(*self._names, *labels))
        for own, stats in ({(): values} if isinstance(values, HistogramStats) else values).items():
            counts = stats.counts or [0] * (len(bounds) + 1)
            les = [*map(floatToGoString, bounds), "+Inf"]
            buckets = list(zip(les, map(float, accumulate(counts)), strict=True))
            family.add_metric((*self._values, *own), buckets, stats.sum)
        return family


def _each(values: float | Values) -> list[tuple[tuple[str, ...], float]]:
    return list(values.items()) if isinstance(values, Mapping) else [((), float(values))]
