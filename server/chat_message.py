"""One answer's events put together: as a whole message, or as the deltas of its stream."""

from __future__ import annotations

import secrets
import string
from collections.abc import Iterable

from msgspec import UNSET

from engine.messages import FinishReason
from server.protocol.chat import ChatDelta, ChatFinishReason, ChatMessage
from server.protocol.tools import FunctionCall, FunctionDelta, ToolCall, ToolCallDelta
from server.tools.events import CallArguments, CallBegins, Content, Event, Reasoning

_ALPHABET = string.ascii_letters + string.digits


class MessageBuilder:
    """`add` events, then take the `message`; or send the `deltas` of each."""

    def __init__(self, *, call_id_chars: int, has_reasoning: bool) -> None:
        self._call_id_chars = call_id_chars
        self._has_reasoning = has_reasoning
        self._content: list[str] = []
        self._reasoning: list[str] = []
        self._calls: list[tuple[str, str, list[str]]] = []  # id, name, arguments

    def add(self, events: Iterable[Event]) -> None:
        self.deltas(events)

    def deltas(self, events: Iterable[Event]) -> list[ChatDelta]:
        """What a client is told of them."""
        return [self._delta(event) for event in events]

    @property
    def message(self) -> ChatMessage:
        content, reasoning = "".join(self._content), "".join(self._reasoning) or None
        calls = [ToolCall(id, FunctionCall(name, "".join(parts))) for id, name, parts in self._calls]
        return ChatMessage(
            "assistant",
            content if content or not (calls or reasoning) else None,
            tool_calls=calls or UNSET,
            reasoning=reasoning if self._has_reasoning else UNSET,
            reasoning_content=reasoning if self._has_reasoning else UNSET,
        )

    def finish_reason(self, reason: FinishReason | None) -> ChatFinishReason | None:
        """A model stops where it wants its calls answered."""
        return "tool_calls" if reason == "stop" and self._calls else reason

    def _delta(self, event: Event) -> ChatDelta:
        match event:
            case Content(text):
                self._content.append(text)
                return ChatDelta(content=text)
            case Reasoning(text):
                self._reasoning.append(text)
                return ChatDelta(reasoning=text, reasoning_content=text)
            case CallBegins(name):
                call_id = self._new_id()
                self._calls.append((call_id, name, []))
                function = FunctionDelta("", name=name)
                return ChatDelta(tool_calls=[ToolCallDelta(len(self._calls) - 1, function, call_id, "function")])
            case CallArguments(text):
                self._calls[-1][2].append(text)
                return ChatDelta(tool_calls=[ToolCallDelta(len(self._calls) - 1, FunctionDelta(text))])

    def _new_id(self) -> str:
        # some templates refuse ids of their model's own calls that are longer than nine characters
        num_random = self._call_id_chars - len("call_") if self._call_id_chars > 9 else self._call_id_chars
        drawn = "".join(secrets.choice(_ALPHABET) for _ in range(num_random))
        return drawn if self._call_id_chars <= 9 else f"call_{drawn}"
