"""What an answer's text turns out to be, piece by piece."""

from __future__ import annotations

from typing import Protocol

import msgspec


class Content(msgspec.Struct, frozen=True):
    """Text for the reader."""

    text: str


class Reasoning(msgspec.Struct, frozen=True):
    """Text that the model writes for itself."""

    text: str


class CallBegins(msgspec.Struct, frozen=True):
    """A call, the next in number, of the function of this name."""

    name: str


class CallArguments(msgspec.Struct, frozen=True):
    """More of the JSON text of the latest call's arguments."""

    text: str


Event = Content | Reasoning | CallBegins | CallArguments


class AnswerParser(Protocol):
    """Of one answer. Nothing of the text is lost: what is neither reasoning nor a call is content."""

    def push(self, text: str) -> list[Event]:
        """More text; what is certain by now."""

    def finish(self) -> list[Event]:
        """There is no more."""


class PlainText:
    """All of it is content."""

    def push(self, text: str) -> list[Event]:
        return [Content(text)] if text else []

    def finish(self) -> list[Event]:
        return []


def overlap(text: str, marks: tuple[str, ...]) -> int:
    """Length of the longest end of the text that begins one of the marks, and is not all of it."""
    longest = 0
    for mark in marks:
        for length in range(min(len(text), len(mark) - 1), longest, -1):
            if text.endswith(mark[:length]):
                longest = length
                break
    return longest
