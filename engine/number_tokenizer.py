"""The tokenizer of a model of random weights. No torch: the server has one beside the engine's."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

from engine.errors import InvalidRequest
from engine.messages import AddedToken
from engine.tokenizer import Tokenizer


class NumberTokenizer(Tokenizer):
    """Stands in where there is no text: a token is its number."""

    has_chat_template = False
    template_text = None
    template_variables: frozenset[str] = frozenset()
    added_tokens: ClassVar[dict[str, AddedToken]] = {}

    def __init__(self) -> None:
        self.eos_token_id = None

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """'12 7' -> [12, 7]; raises `InvalidRequest` for anything else."""
        try:
            return [int(number) for number in text.split()]
        except ValueError:
            raise InvalidRequest("a model of random weights takes token ids or their numbers", param="prompt") from None

    def decode(self, token_ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        return "".join(f" {token_id}" for token_id in token_ids)

    def token_bytes(self, token_id: int) -> bytes:
        return f" {token_id}".encode()

    def to_json(self) -> str:
        raise ValueError("a model of random weights has no text that could have a structure")
