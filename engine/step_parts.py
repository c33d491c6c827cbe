"""What steps consist of: how long each part took, and how many tokens they had."""

from __future__ import annotations

from typing import get_args

from cache.histogram import Histogram, HistogramStats, SizeHistogram
from engine.messages import BATCH_TOKENS, STEP_S, StepPart
from engine.models.decoder import ForwardTimes


class StepParts:
    """A step is the sum of its parts. `moe` is all of the model between attention and logits but for `stall`; `sample`
    is from there to the requests' new text."""

    def __init__(self) -> None:
        self._seconds: dict[StepPart, Histogram] = {part: Histogram(STEP_S) for part in get_args(StepPart)}
        self._tokens = SizeHistogram(BATCH_TOKENS)

    def add(
        self,
        num_tokens: int,
        times: ForwardTimes,
        *,
        model_s: float,
        stall_s: float,
        sample_s: float,
        schedule_s: float,
    ) -> None:
        """A step has ended. `model_s`: until its logits, `stall_s` of it waiting; `sample_s`: from there."""
        seconds = self._seconds
        seconds["attention"].add(times.attention_s)
        seconds["moe"].add(max(0.0, times.feed_forward_s - stall_s))
        seconds["stall"].add(stall_s)
        seconds["sample"].add(max(0.0, model_s - times.attention_s - times.feed_forward_s) + sample_s)
        seconds["schedule"].add(schedule_s)
        self._tokens.add(num_tokens)

    @property
    def step_s(self) -> dict[StepPart, HistogramStats]:
        return {part: histogram.snapshot() for part, histogram in self._seconds.items()}

    @property
    def batch_tokens(self) -> HistogramStats:
        return self._tokens.snapshot()
