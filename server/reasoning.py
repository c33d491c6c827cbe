"""Thoughts before an answer, for models whose chat template has tags for them."""

from __future__ import annotations

from dataclasses import dataclass

from server.tools.events import AnswerParser, Event, Reasoning, overlap
from server.tools.family import Words, text

_TAGS = (("<think>", "</think>"), ("[THINK]", "[/THINK]"), ("<|START_THINKING|>", "<|END_THINKING|>"))


@dataclass(frozen=True, slots=True)
class Thinking:
    """A thought is between the tags. The prompt may have begun it, or, if not `may_begin`, have ended it."""

    opening: str
    closing: str
    has_begun: bool = False
    may_begin: bool = True

    def after(self, prompt_end: str) -> Thinking:
        """As it stands at the end of a prompt."""
        begun, ended = prompt_end.rfind(self.opening), prompt_end.rfind(self.closing)
        is_closed = ended > begun and not prompt_end[ended + len(self.closing) :].strip()
        return Thinking(self.opening, self.closing, has_begun=begun > ended, may_begin=not is_closed)

    def prelude(self, words: Words) -> str:
        """For `engine.sampling_params.Structure`: the thought that may or must come before a structured text."""
        if not (self.has_begun or self.may_begin):
            return ""
        if words.token(self.closing) is None:
            thought = f"thought[lazy]: THOUGHT {text(self.closing)}\nTHOUGHT: /(.|\\n)*/"
        else:
            thought = f"thought: THOUGHT? {words.mark(self.closing)}\nTHOUGHT: /(.|\\n)+/"
        thinks = "thought GAP" if self.has_begun else f"({words.mark(self.opening)} thought GAP)?"
        return f"prelude: {thinks}\n{thought}\nGAP: /\\n{{0,2}}/\n"


def thinking_of(template: str | None) -> Thinking | None:
    """None: the model has no tags for it."""
    for opening, closing in _TAGS:
        if template is not None and closing in template:
            return Thinking(opening, closing)
    return None


class ThoughtParser:
    """An `AnswerParser`: what is between the tags is reasoning, `rest` reads what comes after."""

    def __init__(self, thinking: Thinking, rest: AnswerParser) -> None:
        self._opening, self._closing = thinking.opening, thinking.closing
        self._rest = rest
        self._buffer = ""
        self._is_thinking: bool | None = True if thinking.has_begun else None  # None: not known yet
        self._begun = False  # something of the thought, or of what comes after, was told
        self._space = ""

    def push(self, text: str) -> list[Event]:
        self._buffer += text
        events: list[Event] = []
        if self._is_thinking is None:
            self._begin()
        if self._is_thinking:
            events += self._think()
        if self._is_thinking is False:
            events += self._go_on()
        return events

    def finish(self) -> list[Event]:
        if self._is_thinking:
            events = self._told(self._buffer)
        else:
            events = self._rest.push(self._buffer)
        self._buffer = ""
        return events + self._rest.finish()

    def _begin(self) -> None:
        start = self._buffer.lstrip()
        if start.startswith(self._opening):
            self._buffer = start[len(self._opening) :]
            self._is_thinking = True
        elif not self._opening.startswith(start):
            self._is_thinking = False
            self._begun = True  # white space that begins an answer without a thought is the answer's

    def _think(self) -> list[Event]:
        if self._buffer.lstrip().startswith(self._opening) and not self._begun:  # once more, after the prompt's own
            self._buffer = self._buffer.lstrip()[len(self._opening) :]
        end = self._buffer.find(self._closing)
        if end >= 0:
            events = self._told(self._buffer[:end])
            self._buffer = self._buffer[end + len(self._closing) :]
            self._is_thinking, self._begun = False, False
            return events
        end = len(self._buffer) - overlap(self._buffer, (self._closing,))
        if not self._begun and self._opening.startswith(self._buffer.lstrip()):
            return []
        events = self._told(self._buffer[:end])
        self._buffer = self._buffer[end:]
        return events

    def _told(self, text: str) -> list[Event]:
        """Without the white space around the thought."""
        text = self._space + text
        if not self._begun:
            text = text.lstrip()
        stripped = text.rstrip()
        self._space = text[len(stripped) :]
        if not stripped:
            return []
        self._begun = True
        return [Reasoning(stripped)]

    def _go_on(self) -> list[Event]:
        text = self._buffer if self._begun else self._buffer.lstrip()
        self._buffer = ""
        if not text:
            return []
        self._begun = True
        return self._rest.push(text)
