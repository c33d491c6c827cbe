"""engine/questions.py: each who asks gets the answer to his own question."""

from __future__ import annotations

import asyncio

import pytest

from engine.errors import EngineDead
from engine.messages import CheckIntegrity, IntegrityChecked
from engine.questions import Questions


async def asked(num: int) -> tuple[Questions[CheckIntegrity, IntegrityChecked], list[CheckIntegrity], list]:
    sent: list[CheckIntegrity] = []
    questions: Questions[CheckIntegrity, IntegrityChecked] = Questions(sent.append)
    waiting = [asyncio.ensure_future(questions.ask(CheckIntegrity)) for _ in range(num)]
    await asyncio.sleep(0)
    assert len({question.ask_id for question in sent}) == num
    return questions, sent, waiting


async def test_answers_find_who_asked_in_any_order():
    questions, sent, waiting = await asked(2)
    for number in (1, 0):
        questions.deliver(IntegrityChecked(sent[number].ask_id, f"of {number}"))
    assert [answer.error for answer in await asyncio.gather(*waiting)] == ["of 0", "of 1"]
    assert questions._answers == {}


async def test_an_answer_that_nobody_waits_for_any_more_is_dropped():
    questions, sent, (waiting,) = await asked(1)
    waiting.cancel()
    questions.deliver(IntegrityChecked(sent[0].ask_id))  # cancelled, but has not run yet
    await asyncio.wait([waiting])
    questions.deliver(IntegrityChecked(sent[0].ask_id))
    questions.fail("it ended")
    assert questions._answers == {}
    assert waiting.cancelled()


async def test_an_engine_that_ends_answers_everybody():
    questions, _, waiting = await asked(2)
    questions.fail("it ended")
    for one in waiting:
        with pytest.raises(EngineDead, match="it ended"):
            await one
    assert questions._answers == {}
