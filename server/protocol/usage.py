"""Token counts as OpenAI reports them."""

from __future__ import annotations

import msgspec

from server.collect import Tally


class PromptTokensDetails(msgspec.Struct, frozen=True):
    cached_tokens: int


class Usage(msgspec.Struct, frozen=True):
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptTokensDetails


def usage_of(tally: Tally) -> Usage:
    return Usage(
        prompt_tokens=tally.num_prompt_tokens,
        completion_tokens=tally.num_output_tokens,
        total_tokens=tally.num_prompt_tokens + tally.num_output_tokens,
        prompt_tokens_details=PromptTokensDetails(cached_tokens=tally.num_cached_tokens),
    )
