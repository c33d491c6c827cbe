"""The door of the engine: what no step needs to be tried for. Knows the model's figures only, no tensors."""

from __future__ import annotations

from engine.errors import InvalidRequest
from engine.messages import ModelInfo
from engine.sampling_params import SamplingParams


def check_request(info: ModelInfo, prompt_token_ids: list[int], params: SamplingParams) -> None:
    """Raise `InvalidRequest` if the prompt is empty, too long or not of this vocabulary, or a parameter is not."""
    if not prompt_token_ids:
        raise InvalidRequest("the prompt is empty", param="prompt")
    if not all(0 <= token_id < info.vocab_size for token_id in prompt_token_ids):
        raise InvalidRequest(f"prompt token ids must be between 0 and {info.vocab_size - 1}", param="prompt")
    limit, num_prompt = info.max_model_len, len(prompt_token_ids)
    if num_prompt + (1 if params.max_tokens is None else params.max_tokens) > limit:
        wanted = "" if params.max_tokens is None else f" and max_tokens is {params.max_tokens}"
        raise too_long(limit, f"{num_prompt}", wanted, param="prompt" if num_prompt >= limit else "max_tokens")
    for param, token_ids in (("logit_bias", params.logit_bias), ("stop_token_ids", params.stop_token_ids)):
        if any(token_id >= info.vocab_size for token_id in token_ids):
            raise InvalidRequest(f"{param} names a token beyond the vocabulary of {info.vocab_size}", param=param)


def too_long(limit: int, num_prompt: str, wanted: str = "", *, param: str) -> InvalidRequest:
    """In OpenAI's words, which clients look for."""
    return InvalidRequest(
        f"This model's maximum context length is {limit} tokens. However, the prompt has {num_prompt} tokens{wanted}.",
        param=param,
        code="context_length_exceeded",
    )
