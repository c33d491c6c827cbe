"""Adding up a request's outputs: token counts over all choices, and each choice's whole text."""

from __future__ import annotations

from dataclasses import dataclass, field

from engine.messages import FinishReason, PositionLogprobs, RequestOutput


class Tally:
    """Token counts of a request with one or more choices, from the totals that each output carries."""

    def __init__(self) -> None:
        self._latest: dict[int, RequestOutput] = {}

    def add(self, index: int, output: RequestOutput) -> None:
        self._latest[index] = output

    @property
    def num_prompt_tokens(self) -> int:
        return sum(output.num_prompt_tokens for output in self._latest.values())

    @property
    def num_cached_tokens(self) -> int:
        return sum(output.num_cached_tokens for output in self._latest.values())

    @property
    def num_output_tokens(self) -> int:
        return sum(output.num_output_tokens for output in self._latest.values())


@dataclass(slots=True)
class Collected:
    """One choice, complete when it has a `finish_reason`."""

    texts: list[str] = field(default_factory=list)
    logprobs: list[PositionLogprobs] = field(default_factory=list)
    finish_reason: FinishReason | None = None
    stop_reason: int | str | None = None

    @property
    def text(self) -> str:
        return "".join(self.texts)

    def add(self, output: RequestOutput) -> None:
        self.texts.append(output.text)
        self.logprobs.extend(output.logprobs or ())
        if output.finish_reason is not None:
            self.finish_reason, self.stop_reason = output.finish_reason, output.stop_reason
