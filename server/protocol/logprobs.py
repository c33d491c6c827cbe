"""Log-probabilities in the two shapes OpenAI has for them."""

from __future__ import annotations

import codecs
import math
from collections.abc import Iterable

import msgspec

from engine.messages import PositionLogprobs, TokenLogprob

_LOWEST = -9999.0  # OpenAI's stand-in for minus infinity, which JSON cannot say


class TopLogprob(msgspec.Struct, frozen=True):
    token: str
    logprob: float
    bytes: list[int]


class ChatTokenLogprob(msgspec.Struct, frozen=True):
    token: str
    logprob: float
    bytes: list[int]
    top_logprobs: list[TopLogprob]


class ChatLogprobs(msgspec.Struct, frozen=True):
    content: list[ChatTokenLogprob]
    refusal: None = None


class CompletionLogprobs(msgspec.Struct, frozen=True):
    """Parallel lists, one entry for each token; `text_offset` counts characters from the start of the choice's text."""

    tokens: list[str]
    token_logprobs: list[float | None]  # null: of a prompt's first token
    top_logprobs: list[dict[str, float] | None]
    text_offset: list[int]


def chat_logprobs(positions: Iterable[PositionLogprobs]) -> ChatLogprobs:
    return ChatLogprobs(
        [
            ChatTokenLogprob(
                _text(position.chosen),
                _finite(position.chosen.logprob),
                list(position.chosen.token),
                [TopLogprob(_text(top), _finite(top.logprob), list(top.token)) for top in position.top],
            )
            for position in positions
        ]
    )


class TextOffsets:
    """Where each token begins in the text of one choice, whatever way characters are split into tokens."""

    def __init__(self, echo: str = "") -> None:
        """`echo`: what the text begins with; `of_echo` is then called for the tokens of it, before `next`."""
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._echo = echo
        self._at = 0  # within the echo
        self._num_chars = len(echo)

    def next(self, token: bytes) -> int:
        offset = self._num_chars
        self._num_chars += len(self._decoder.decode(token))
        return offset

    def of_echo(self, token: bytes) -> int:
        """A token that is not in the text, as a special one that was put before it, takes no room."""
        offset = self._at
        part = self._decoder.decode(token)
        for seen in (part, part.removeprefix(" ")):  # a space that a tokenizer puts before everything
            if self._echo.startswith(seen, offset):
                self._at += len(seen)
                break
        return offset


def completion_logprobs(
    positions: Iterable[PositionLogprobs], offsets: TextOffsets, *, prompt: Iterable[PositionLogprobs] = ()
) -> CompletionLogprobs:
    """Those of the echoed `prompt`, if any, and of the tokens after it.

    The chosen token is always among `top_logprobs`, which can so have one entry more than was asked for.
    """
    result = CompletionLogprobs([], [], [], [])
    for offset_of, some in ((offsets.of_echo, prompt), (offsets.next, positions)):
        for position in some:
            chosen = position.chosen
            is_first = math.isnan(chosen.logprob)
            result.tokens.append(_text(chosen))
            result.token_logprobs.append(None if is_first else _finite(chosen.logprob))
            # two halves of characters may look alike as text; the likelier one stays
            top: dict[str, float] = {}
            for entry in (*position.top, chosen):
                top.setdefault(_text(entry), _finite(entry.logprob))
            result.top_logprobs.append(None if is_first else top)
            result.text_offset.append(offset_of(chosen.token))
    return result


def _text(token: TokenLogprob) -> str:
    return token.token.decode("utf-8", "replace")


def _finite(logprob: float) -> float:
    return logprob if logprob > _LOWEST else _LOWEST  # NaN too compares as not above
