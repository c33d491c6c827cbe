"""How fast a streamed answer was, as its client saw it: one definition for `foregate bench serve` and `loadtest`."""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import msgspec

from server.remote import RemoteError

_TEXTS = ("content", "reasoning_content", "reasoning", "tool_calls")


class Spread(msgspec.Struct, frozen=True):
    """Mean and percentiles; NaN (in JSON null) of nothing."""

    mean: float
    p50: float
    p90: float
    p99: float


@dataclass(frozen=True, slots=True)
class Answer:
    """One request as the client saw it: seconds on one clock, tokens as the server counted them."""

    sent_at: float
    chunks_at: list[float]  # not empty
    ended_at: float
    num_tokens: int
    num_cached_tokens: int = 0


class Figures(msgspec.Struct, frozen=True, kw_only=True):
    """Of many requests. All but the counts leave out those that failed."""

    num_requests: int  # failed ones included
    num_errors: int
    wall_s: float
    output_tokens_per_s: float  # of all together
    ttft_s: Spread  # from sending a request to its first token
    inter_token_s: Spread  # mean: of requests' (last - first) / (tokens - 1); percentiles: of gaps between chunks
    latency_s: Spread  # from sending a request to the end of its stream
    num_chunks: int  # that brought tokens; where they are fewer than those, some came together
    num_cached_tokens: int  # of prompts, if the server tells
    errors: dict[str, int]  # message -> times


class _Details(msgspec.Struct):
    cached_tokens: int | None = None


class Usage(msgspec.Struct):
    """As the server counts."""

    prompt_tokens: int
    completion_tokens: int
    prompt_tokens_details: _Details | None = None

    @property
    def num_cached_tokens(self) -> int:
        return (self.prompt_tokens_details.cached_tokens or 0) if self.prompt_tokens_details else 0


class _Choice(msgspec.Struct):
    text: str | None = None  # of a completion
    delta: dict[str, Any] | None = None  # of a chat
    finish_reason: str | None = None

    @property
    def brings_tokens(self) -> bool:
        """Text does, and so does a chunk without any: its token has none, or not a whole character yet.

        The last chunk, with the reason, and a chat's first, with the role, bring none unless they have text.
        """
        if self.delta is None:
            return bool(self.text) or self.finish_reason is None
        if any(self.delta.get(name) for name in _TEXTS):
            return True
        return self.finish_reason is None and self.delta.get("role") is None


class _Chunk(msgspec.Struct):
    choices: list[_Choice] = []
    usage: Usage | None = None


class StreamTimes:
    """Told of each event of one streamed answer when it comes in."""

    def __init__(self, sent_at: float) -> None:
        self.sent_at = sent_at
        self.chunks_at: list[float] = []
        self.usage: Usage | None = None
        self._finished_at: float | None = None

    def saw(self, event: dict[str, Any], now: float) -> bool:
        """Whether it brought tokens; raises `RemoteError` for what is no chunk of a completion or chat."""
        try:
            chunk = msgspec.convert(event, _Chunk)
        except msgspec.ValidationError as exc:
            raise RemoteError(f"an event of the stream is not a completion: {exc}") from None
        self.usage = chunk.usage or self.usage
        if any(choice.finish_reason is not None for choice in chunk.choices):
            self._finished_at = now
        if not any(choice.brings_tokens for choice in chunk.choices):
            return False
        self.chunks_at.append(now)
        return True

    def answer(self, ended_at: float) -> Answer:
        """What the stream was; raises `RemoteError` if it was none."""
        if self.usage is None:
            raise RemoteError("the stream had no usage")
        chunks_at = self.chunks_at
        if not chunks_at:
            # tokens that have no text, such as an end at once, may come with the finish reason only
            if self._finished_at is None or not self.usage.completion_tokens:
                raise RemoteError("the stream had no tokens")
            chunks_at = [self._finished_at]
        usage = self.usage
        return Answer(self.sent_at, chunks_at, ended_at, usage.completion_tokens, usage.num_cached_tokens)


def figures(answers: Sequence[Answer], wall_s: float, errors: Counter[str]) -> Figures:
    """`errors` counts by message the requests that are not among the answers."""
    per_token = [(a.chunks_at[-1] - a.chunks_at[0]) / (a.num_tokens - 1) for a in answers if a.num_tokens > 1]
    gaps = [after - before for a in answers for before, after in zip(a.chunks_at, a.chunks_at[1:], strict=False)]
    return Figures(
        num_requests=len(answers) + errors.total(),
        num_errors=errors.total(),
        wall_s=wall_s,
        output_tokens_per_s=sum(a.num_tokens for a in answers) / wall_s,
        ttft_s=spread([a.chunks_at[0] - a.sent_at for a in answers]),
        inter_token_s=spread(gaps, mean_of=per_token),
        latency_s=spread([a.ended_at - a.sent_at for a in answers]),
        num_chunks=sum(len(a.chunks_at) for a in answers),
        num_cached_tokens=sum(a.num_cached_tokens for a in answers),
        errors=dict(errors),
    )


def spread(values: Sequence[float], *, mean_of: Sequence[float] | None = None) -> Spread:
    """Percentiles of `values`; the mean of `mean_of`, where that is something else."""
    means = values if mean_of is None else mean_of
    ordered = sorted(values)
    mean = statistics.fmean(means) if means else float("nan")
    return Spread(mean, percentile(ordered, 50), percentile(ordered, 90), percentile(ordered, 99))


def percentile(ordered: Sequence[float], percent: float) -> float:
    """By linear interpolation between the two nearest: percentile([1, 3], 50) == 2; NaN of nothing."""
    if not ordered:
        return float("nan")
    below, share = divmod((len(ordered) - 1) * percent / 100, 1)
    low, high = ordered[int(below)], ordered[min(int(below) + 1, len(ordered) - 1)]
    return low + (high - low) * share
