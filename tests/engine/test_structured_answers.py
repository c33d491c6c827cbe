"""Structured answers through the asynchronous face: refused at the door, cancelled while a grammar is compiled."""

from __future__ import annotations

import asyncio
import json

import pytest

from engine.async_engine import AsyncEngine
from engine.errors import InvalidRequest
from engine.sampling_params import SamplingParams, Structure
from tests.engine.test_async_engine import collect, config, engine, settled  # noqa: F401  # fixtures
from tests.engine.test_grammar_trial import ENDLESS, of


def params(structure: Structure) -> SamplingParams:
    return SamplingParams(max_tokens=60, seed=1, structure=structure)


async def test_an_answer_is_in_its_grammar(engine: AsyncEngine):  # noqa: F811
    structures = [of("regex", "x{5}"), of("json", '{"const": {"a": 1}}'), of("choice", '["yes", "no"]')]
    answers = await asyncio.gather(*(collect(engine, f"r{i}", [1, 2], params(s)) for i, s in enumerate(structures)))
    texts = ["".join(output.text for output in outputs) for outputs in answers]
    assert texts[0] == "xxxxx"
    assert json.loads(texts[1]) == {"a": 1}
    assert texts[2] in ("yes", "no")
    assert {outputs[-1].finish_reason for outputs in answers} == {"stop"}


async def test_what_cannot_be_enforced_is_refused_before_anything_is_queued(engine: AsyncEngine):  # noqa: F811
    with pytest.raises(InvalidRequest, match="'uniqueItems'") as caught:
        await collect(engine, "a", [1], params(of("json", '{"uniqueItems": true}')))
    assert caught.value.param == "here"
    assert (await settled(engine)).prompt_tokens_total == 0


async def test_a_client_that_goes_while_its_grammar_is_compiled_leaves_nothing_behind(engine: AsyncEngine):  # noqa: F811
    leaving = asyncio.ensure_future(collect(engine, "a", [1], params(of("json", ENDLESS))))
    await collect(engine, "b", [1], params(of("regex", "x{5}")))
    assert not leaving.done()
    leaving.cancel()
    await asyncio.wait([leaving])
    await asyncio.sleep(0)
    assert engine._trial._answers == {}
    stats = await settled(engine)
    assert stats.prompt_tokens_total == 1
    assert await engine.integrity_error() is None
