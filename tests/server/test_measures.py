"""server/measures.py: which chunks bring tokens, in completions and in chats."""

from __future__ import annotations

from typing import Any

import pytest

from server.measures import StreamTimes, percentile
from server.remote import RemoteError

USAGE = {"choices": [], "usage": {"prompt_tokens": 3, "completion_tokens": 2}}


def chat(finish_reason: str | None = None, **delta: Any) -> dict[str, Any]:
    return {"choices": [{"index": 0, "delta": delta, "finish_reason": finish_reason}]}


def times_of(*events: dict[str, Any]) -> StreamTimes:
    times = StreamTimes(0.0)
    for second, event in enumerate(events, start=1):
        times.saw(event, float(second))
    return times


def test_the_role_and_the_reason_of_a_chat_bring_no_tokens_and_what_is_said_or_thought_does() -> None:
    opening = chat(role="assistant", content="")
    assert times_of(opening, chat(content="a"), chat(content="b"), chat("stop")).chunks_at == [2, 3]
    assert times_of(opening, chat(reasoning_content="so"), chat(content="b"), chat("stop")).chunks_at == [2, 3]
    assert times_of(opening, chat(tool_calls=[{"index": 0}]), chat("tool_calls")).chunks_at == [2]
    assert times_of(chat(role="assistant", content="a"), chat("length", content="b")).chunks_at == [1, 2]


def test_a_token_without_text_is_one() -> None:
    assert times_of(chat(role="assistant"), chat(content=""), chat(), chat("stop")).chunks_at == [2, 3]


def test_an_answer_of_nothing_but_its_end_came_when_that_came() -> None:
    answer = times_of(chat(role="assistant", content=""), chat("stop"), USAGE).answer(ended_at=4.0)
    assert (answer.chunks_at, answer.num_tokens, answer.ended_at) == ([2.0], 2, 4.0)


def test_a_stream_without_usage_or_tokens_is_no_answer() -> None:
    with pytest.raises(RemoteError, match="no usage"):
        times_of(chat(content="a")).answer(2.0)
    with pytest.raises(RemoteError, match="no tokens"):
        times_of(chat(role="assistant"), USAGE).answer(2.0)
    with pytest.raises(RemoteError, match="not a completion"):
        times_of({"choices": [{"delta": "a"}]})


def test_percentiles_lie_between_the_two_nearest() -> None:
    assert percentile([1.0, 3.0], 50) == 2.0
    assert percentile([5.0], 99) == 5.0
    assert [percentile([0.0, 1.0, 2.0, 3.0, 4.0], p) for p in (0, 25, 90, 100)] == [0.0, 1.0, pytest.approx(3.6), 4.0]
