"""Adding up a request's outputs: token counts over all choices, and each choice's whole text."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

from engine.messages import FinishReason, PositionLogprobs, RequestOutput


class Tally:
    """Token counts of a request, from the totals that each output carries. A prompt counts once for its n choices."""

    def __init__(self, n: int = 1) -> None:
        self._n = n
        self._latest: dict[int, RequestOutput] = {}

    def add(self, index: int, output: RequestOutput) -> None:
        self._latest[index] = output

    @property
    def num_prompt_tokens(self) -> int:
        return sum(output.num_prompt_tokens for output in self._of_prompts())

    @property
    def num_cached_tokens(self) -> int:
        return sum(output.num_cached_tokens for output in self._of_prompts())

    @property
    def num_output_tokens(self) -> int:
        return sum(output.num_output_tokens for output in self._latest.values())

    def _of_prompts(self) -> Iterator[RequestOutput]:
        return (output for index, output in self._latest.items() if index % self._n == 0)


@dataclass(slots=True)
class Collected:
    """One choice, complete when it has a `finish_reason`."""

    texts: list[str] = field(default_factory=list)
    logprobs: list[PositionLogprobs] = field(default_factory=list)
    prompt_logprobs: list[PositionLogprobs] = field(default_factory=list)
    finish_reason: FinishReason | None = None
    stop_reason: int | str | None = None

    @property
    def text(self) -> str:
        return "".join(self.texts)

    def add(self, output: RequestOutput) -> None:
        self.texts.append(output.text)
        self.logprobs.extend(output.logprobs or ())
        self.prompt_logprobs.extend(output.prompt_logprobs or ())
        if output.finish_reason is not None:
            self.finish_reason, self.stop_reason = output.finish_reason, output.stop_reason
