"""Text to token ids and back, and the chat template. Wraps the checkpoint's own tokenizer files."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

from engine.chat_template import TemplateRefusal, render, variables_of
from engine.errors import CheckpointError, InvalidRequest
from engine.messages import AddedToken


class TokenDecoder(Protocol):
    """The part of a tokenizer that a step needs."""

    eos_token_id: int | None

    @property
    def has_chat_template(self) -> bool: ...

    @property
    def template_text(self) -> str | None: ...

    @property
    def template_variables(self) -> frozenset[str]: ...

    @property
    def added_tokens(self) -> dict[str, AddedToken]: ...

    def decode(self, token_ids: Sequence[int], *, skip_special_tokens: bool = True) -> str: ...

    def token_bytes(self, token_id: int) -> bytes: ...

    def to_json(self) -> str: ...


class Tokenizer:
    """A fast Hugging Face tokenizer. Calls may come from several threads at once."""

    def __init__(self, directory: Path) -> None:
        """Load from a checkpoint directory; no code of that directory is run. Raises `CheckpointError`."""
        from transformers import AutoTokenizer

        log = logging.getLogger("transformers")
        level = log.level
        log.setLevel(logging.ERROR)  # it warns of model types that it does not know, which is no matter here
        try:
            wrapper = AutoTokenizer.from_pretrained(directory, local_files_only=True, trust_remote_code=False)
        except Exception as error:  # transformers raises many kinds for files that it cannot take
            raise CheckpointError(f"cannot load the tokenizer of {directory.name}: {error}") from error
        finally:
            log.setLevel(level)
        if not wrapper.is_fast:
            raise CheckpointError(f"the tokenizer of {directory.name} has no fast version (tokenizer.json)")
        self._wrapper = wrapper
        self._fast = wrapper.backend_tokenizer
        self._special_ids = frozenset(wrapper.all_special_ids)
        self.vocab_size: int = self._fast.get_vocab_size()
        self.eos_token_id: int | None = wrapper.eos_token_id

    @property
    def has_chat_template(self) -> bool:
        return bool(self._wrapper.chat_template)

    @property
    def template_text(self) -> str | None:
        return self.chat_template(has_tools=True) if self.has_chat_template else None

    @property
    def template_variables(self) -> frozenset[str]:
        """What the template reads that is not its own; empty if that cannot be told."""
        return frozenset() if self.template_text is None else variables_of(self.template_text)

    @property
    def added_tokens(self) -> dict[str, AddedToken]:
        """By their text."""
        return {
            token.content: AddedToken(token_id, token.special)
            for token_id, token in self._fast.get_added_tokens_decoder().items()
        }

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        # a batch of one is the same, but lets other threads run meanwhile: a megabyte takes seconds
        ids: list[int] = self._fast.encode_batch([text], add_special_tokens=add_special_tokens)[0].ids
        return ids

    def decode(self, token_ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        text: str = self._fast.decode(list(token_ids), skip_special_tokens=skip_special_tokens)
        return text

    def chat_template(self, *, has_tools: bool = False) -> str:
        """The model's own; raises `InvalidRequest` if it has none. Some have a second one for tools."""
        if not self.has_chat_template:
            raise InvalidRequest("this model has no chat template; use /v1/completions", param="messages")
        template: str = self._wrapper.get_chat_template(None, [] if has_tools else None)
        return template

    @property
    def special_tokens(self) -> dict[str, str]:
        """bos_token and the like, as templates know them."""
        return dict(self._wrapper.special_tokens_map)

    def render_chat(self, messages: list[dict[str, Any]], *, add_generation_prompt: bool = True) -> list[int]:
        """Chat messages through the model's own template; raises `InvalidRequest` if it has none or refuses them.

        In this process, which a template may hold up for ever: for messages of our own.
        """
        variables = {**self.special_tokens, "add_generation_prompt": add_generation_prompt}
        try:
            text = render(self.chat_template(), messages, variables)
        except TemplateRefusal as refusal:
            raise InvalidRequest(
                f"the model's chat template refuses these messages: {refusal}", param="messages"
            ) from refusal
        return self.encode(text, add_special_tokens=False)

    def to_json(self) -> str:
        """As tokenizer.json has it, with the tokens that the model's other files add; without padding."""
        copied = type(self._fast).from_str(self._fast.to_str())
        copied.no_padding()
        copied.no_truncation()
        text: str = copied.to_str()
        return text

    @property
    def special_ids(self) -> frozenset[int]:
        return self._special_ids

    def is_special(self, token_id: int) -> bool:
        return token_id in self._special_ids

    def token_bytes(self, token_id: int) -> bytes:
        """The bytes one token stands for; half a character is possible."""
        token = self._fast.id_to_token(token_id)
        if token is None:
            return b""
        if token_id not in self._special_ids:
            if all(c in _BYTE_OF_CHAR for c in token) and self._is_byte_level:
                return bytes(_BYTE_OF_CHAR[c] for c in token)
            if len(token) == 6 and token.startswith("<0x") and token.endswith(">"):
                return bytes([int(token[3:5], 16)])
            if not self._is_byte_level:
                return str(token).replace("\u2581", " ").encode()
        return str(token).encode()

    @property
    def _is_byte_level(self) -> bool:
        return type(self._fast.decoder).__name__ == "ByteLevel"


def _bytes_to_unicode() -> dict[int, str]:
    """GPT-2's printable stand-in for each byte (Radford et al. 2019, encoder.py)."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    table = {byte: chr(byte) for byte in printable}
    for i, byte in enumerate(byte for byte in range(256) if byte not in table.copy()):
        table[byte] = chr(256 + i)
    return table


_BYTE_OF_CHAR = {char: byte for byte, char in _bytes_to_unicode().items()}
