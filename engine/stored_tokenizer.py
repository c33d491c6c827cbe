"""A tokenizer that was loaded in another process: what a step needs of it, without the seconds that loading takes."""

from __future__ import annotations

from typing import Any

import msgspec

from engine.tokenizer import Tokenizer


class TokenizerState(msgspec.Struct, frozen=True):
    """What a fast tokenizer is, and the text of its chat template."""

    json: str  # as Hugging Face's tokenizers write it
    special_ids: list[int]
    eos_token_id: int | None
    template: str | None  # the one for tools where there are two


def state_of(tokenizer: Tokenizer) -> TokenizerState:
    """Of one with text."""
    return TokenizerState(
        tokenizer.to_json(), sorted(tokenizer.special_ids), tokenizer.eos_token_id, tokenizer.template_text
    )


class StoredTokenizer(Tokenizer):
    """Renders no chat: that is done where the tokenizer was loaded."""

    has_chat_template = False
    template_text: str | None = None

    def __init__(self, state: TokenizerState) -> None:
        from tokenizers import Tokenizer as FastTokenizer

        self._fast: Any = FastTokenizer.from_str(state.json)
        self._special_ids = frozenset(state.special_ids)
        self.vocab_size = self._fast.get_vocab_size()
        self.eos_token_id = state.eos_token_id
        self.has_chat_template = state.template is not None
        self.template_text = state.template

    def to_json(self) -> str:
        text: str = self._fast.to_str()
        return text
