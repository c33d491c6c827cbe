"""Parameters that clients know and we do not honour: accepted where they ask for nothing, else refused by name."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from server.errors import BadRequest

# sent by SDKs and agents; they change nothing in the answer
WITHOUT_EFFECT = frozenset(
    {
        "user",
        "metadata",
        "store",
        "service_tier",
        "prompt_cache_key",
        "prompt_cache_retention",
        "safety_identifier",
        "prediction",
        "parallel_tool_calls",  # without tools there is nothing to call
    }
)

# null is always the same as absent; otherwise only the values listed here are, being what happens anyway
NOT_HONOURED: Mapping[str, tuple[Any, ...]] = {
    "n": (1,),
    "best_of": (1,),
    "echo": (False,),
    "suffix": ("",),
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "functions": ([],),
    "function_call": ("none", "auto"),
    "guided_json": (),
    "guided_regex": (),
    "guided_choice": (),
    "guided_grammar": (),
    "guided_decoding_backend": (),
    "guided_whitespace_pattern": (),
    "structural_tag": (),
    "grammar": (),
    "json_schema": (),
    "modalities": (["text"],),
    "audio": (),
    "web_search_options": (),
    "reasoning_effort": (),
    "reasoning": (),
    "include_reasoning": (True,),
    "thinking": (),
    "verbosity": ("medium",),
    "chat_template": (),
    "chat_template_kwargs": ({},),
    "documents": ([],),
    "continue_final_message": (False,),
    "prompt_logprobs": (),
    "prompt_embeds": (),
    "use_beam_search": (False,),
    "length_penalty": (1, 1.0),
    "bad_words": ([],),
    "allowed_token_ids": (),
    "include_stop_str_in_output": (False,),
    "truncate_prompt_tokens": (),
    "add_special_tokens": (True,),
    "spaces_between_special_tokens": (True,),
    "detokenize": (True,),
    "return_token_ids": (False,),
    "return_tokens_as_token_ids": (False,),
    "logits_processors": ([],),
    "mm_processor_kwargs": (),
    "priority": (0,),
    "typical_p": (1, 1.0),
    "mirostat": (0,),
}


def refuse_unsupported(fields: Mapping[str, Any]) -> list[str]:
    """Judge the fields that a body does not declare; returns the unknown names, raises `BadRequest` for the rest."""
    unknown: list[str] = []
    for name, value in fields.items():
        if name in WITHOUT_EFFECT:
            continue
        harmless = NOT_HONOURED.get(name)
        if harmless is None:
            unknown.append(name)
        elif value is not None and not any(type(value) is type(same) and value == same for same in harmless):
            raise BadRequest(_message(name, harmless), param=name, code="unsupported_parameter")
    return unknown


def _message(name: str, harmless: tuple[Any, ...]) -> str:
    if not harmless:
        return f"{name} is not supported"
    return f"{name} is not supported, except as {' or '.join(json.dumps(value) for value in harmless)}"
