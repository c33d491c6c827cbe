"""One request's state in the engine. Stores two lengths and derives the rest; knows no tensors."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from engine.detokenizer import Detokenizer
from engine.messages import FinishReason
from engine.sampling_params import SamplingParams

if TYPE_CHECKING:
    from llguidance import LLMatcher


@dataclass(slots=True, eq=False)
class Request:
    """`token_ids` are prompt and output together; KV exists for the first `num_computed_tokens` of them.

    `max_num_tokens` bounds prompt and output together. `seed` is settled here, so that a preempted request resumes
    with the same random numbers.
    """

    request_id: str
    token_ids: list[int]
    num_prompt_tokens: int
    params: SamplingParams
    max_num_tokens: int
    seed: int
    detokenizer: Detokenizer
    number: int = 0  # of the engine's requests, in order of arrival
    num_computed_tokens: int = 0
    num_cached_tokens: int = 0  # prompt tokens found in the prefix cache when first scheduled
    block_ids: list[int] = field(default_factory=list)
    block_hashes: list[bytes] = field(default_factory=list)  # of the full blocks, chained
    was_scheduled: bool = False
    num_scored: int = 0  # prompt tokens, from the second on, whose log-probabilities are known
    new_scores: list[list[tuple[int, float]]] = field(default_factory=list)  # of prompt tokens, not told yet
    matcher: LLMatcher | None = None  # of a structured answer, where it stands after the output so far
    finish_reason: FinishReason | None = None

    @property
    def num_tokens(self) -> int:
        return len(self.token_ids)

    @property
    def num_new_tokens(self) -> int:
        """Tokens whose KV is still to be computed; 1 while decoding."""
        return self.num_tokens - self.num_computed_tokens

    @property
    def next_token_id(self) -> int | None:
        """What a decoding request computes next; None while its prompt is computed."""
        return self.token_ids[-1] if self.num_new_tokens == 1 else None

    @property
    def num_output_tokens(self) -> int:
        return self.num_tokens - self.num_prompt_tokens

    @property
    def wants_scores(self) -> bool:
        """Whether log-probabilities of prompt tokens are still to be computed; a cached prefix has none."""
        return self.params.prompt_logprobs is not None and self.num_scored < self.num_prompt_tokens - 1

    @property
    def output_token_ids(self) -> list[int]:
        return self.token_ids[self.num_prompt_tokens :]
