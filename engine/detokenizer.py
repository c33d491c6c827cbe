"""Turns one request's tokens into text as they come: never half a character, never part of a stop string."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

_REPLACEMENT = "\ufffd"  # what a decoder shows for an incomplete character
_MAX_CHAR_TOKENS = 4  # a UTF-8 character has at most 4 bytes, so at most 4 tokens hold one back


class Decoder(Protocol):
    """The part of `Tokenizer` that is needed here."""

    def decode(self, token_ids: Sequence[int], *, skip_special_tokens: bool = True) -> str: ...


class Detokenizer:
    """Feed tokens with `push`; each call returns the text that is now final.

    A token's text may depend on its neighbours (byte pieces, leading spaces), so text is the difference of two
    decodings that start at the same earlier token. The held-back tail is what might still become a stop string.
    """

    def __init__(
        self,
        decoder: Decoder,
        prompt_token_ids: Sequence[int],
        *,
        stop: Sequence[str] = (),
        skip_special_tokens: bool = True,
    ) -> None:
        self._decoder = decoder
        self._skip_special_tokens = skip_special_tokens
        self._stop = tuple(stop)
        self._tokens = list(prompt_token_ids[-_MAX_CHAR_TOKENS:])  # context: the first token's text may need it
        self._prefix_idx = 0  # decoding starts here
        self._read_idx = len(self._tokens)  # text of the tokens before is out
        self._held = ""
        self.stop_string: str | None = None  # the one that was found

    def push(self, token_id: int, *, may_stop: bool = True) -> str:
        """The next token; returns new final text, up to a stop string if `stop_string` is set by it.

        Without `may_stop` stop strings that are complete by now are let through.
        """
        self._tokens.append(token_id)
        before = self._decode(self._prefix_idx, self._read_idx)
        text = self._decode(self._prefix_idx, len(self._tokens))
        num_unread = len(self._tokens) - self._read_idx
        if text.endswith(_REPLACEMENT) and num_unread < _MAX_CHAR_TOKENS:
            return ""
        if len(text) <= len(before):
            return ""
        self._prefix_idx, self._read_idx = self._read_idx, len(self._tokens)
        self._trim()
        return self._emit(text[len(before) :], may_stop)

    def flush(self) -> str:
        """No more tokens: whatever is held back, an incomplete character as U+FFFD. Empty after a stop string."""
        if self.stop_string is not None:
            return ""
        before = self._decode(self._prefix_idx, self._read_idx)
        rest = self._decode(self._prefix_idx, len(self._tokens))[len(before) :]
        self._prefix_idx = self._read_idx = len(self._tokens)
        text = self._emit(rest, True)
        if self.stop_string is None:
            text, self._held = text + self._held, ""
        return text

    def _decode(self, start: int, end: int) -> str:
        return self._decoder.decode(self._tokens[start:end], skip_special_tokens=self._skip_special_tokens)

    def _trim(self) -> None:
        del self._tokens[: self._prefix_idx]
        self._read_idx -= self._prefix_idx
        self._prefix_idx = 0

    def _emit(self, new_text: str, may_stop: bool) -> str:
        text = self._held + new_text
        found = [(at, stop) for stop in self._stop if (at := text.find(stop)) >= 0] if may_stop else []
        if found:
            at, self.stop_string = min(found, key=lambda hit: (hit[0] + len(hit[1]), hit[0]))
            self._held = ""
            return text[:at]
        num_held = max((_overlap(text, stop) for stop in self._stop), default=0)
        self._held = text[len(text) - num_held :]
        return text[: len(text) - num_held]


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of text that begins stop."""
    for length in range(min(len(text), len(stop) - 1), 0, -1):
        if text.endswith(stop[:length]):
            return length
    return 0
