"""Texts and chats to token ids and back, off the event loop where that takes long."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from functools import partial
from typing import Any

from engine.admission import too_long
from engine.errors import InvalidRequest
from engine.messages import ModelInfo
from engine.template_pool import TemplatePool
from engine.tokenizer import Tokenizer

_LONG_TEXT = 4096  # characters; longer texts are tokenised off the event loop
_CHARS_A_TOKEN = 32  # texts longer than that many for each token of the context are looked at in part first
_CUT_TOKENS = 64  # that may become fewer when a text goes on where it was cut


class Prompts:
    """See `AsyncEngine`, whose methods these are; all raise what the two functions it is given raise."""

    def __init__(self, tokenizer: Callable[[], Tokenizer], info: Callable[[], ModelInfo]) -> None:
        """Both of the model that is loaded at the time."""
        self._tokenizer = tokenizer
        self._info = info
        self._templates = TemplatePool()

    async def of_chat(
        self,
        messages: list[dict[str, Any]],
        *,
        continue_final_message: bool,
        tools: list[dict[str, Any]] | None,
        variables: dict[str, Any],
    ) -> list[int]:
        tokenizer = self._tokenizer()
        text = await self._templates.render(
            tokenizer.chat_template(has_tools=tools is not None),
            messages,
            {**variables, **tokenizer.special_tokens, "tools": tools},
            continue_final_message=continue_final_message,
        )
        return await self.encode(text, add_special_tokens=False, param="messages")

    async def encode(self, text: str, *, add_special_tokens: bool = True, param: str = "prompt") -> list[int]:
        encode = partial(self._tokenizer().encode, add_special_tokens=add_special_tokens)
        if len(text) < _LONG_TEXT:
            return encode(text)
        limit = self._info().max_model_len
        begin = text[: _CHARS_A_TOKEN * limit]
        if len(begin) < len(text):
            num_tokens = len(await asyncio.to_thread(encode, begin))
            if num_tokens > limit + _CUT_TOKENS:
                raise too_long(limit, f"at least {num_tokens - _CUT_TOKENS}", param=param)
        return await asyncio.to_thread(encode, text)

    async def decode(self, token_ids: list[int]) -> str:
        vocab_size = self._info().vocab_size
        if any(not 0 <= token_id < vocab_size for token_id in token_ids):
            raise InvalidRequest(f"token ids must be between 0 and {vocab_size - 1}", param="tokens")
        return await asyncio.to_thread(self._tokenizer().decode, token_ids, skip_special_tokens=False)

    async def close(self) -> None:
        """End the templates' processes."""
        await self._templates.close()
