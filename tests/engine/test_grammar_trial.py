"""Grammars are tried out in a process that can be killed: whatever they do to the compiler, others are served."""

from __future__ import annotations

import asyncio
import json
import os
import re
import signal
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from engine.errors import EngineOverloaded, InvalidRequest
from engine.grammar_trial import GrammarTrial
from engine.number_tokenizer import NumberTokenizer
from engine.sampling_params import MAX_STRUCTURE_CHARS, Structure
from engine.tokenizer import Tokenizer
from tests.engine.tiny_models import save_tokenizer

ENDLESS = json.dumps({"type": "integer", "multipleOf": 1_000_003})  # a minute and more of regex algebra


def of(kind: str, source: str) -> Structure:
    return Structure(kind=kind, source=source, param="here")  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def tokenizer_json(tmp_path_factory: pytest.TempPathFactory) -> str:
    directory: Path = tmp_path_factory.mktemp("tokenizer")
    save_tokenizer(directory)
    return Tokenizer(directory).to_json()


@pytest.fixture
async def trial(tokenizer_json: str) -> AsyncIterator[GrammarTrial]:
    trial = GrammarTrial(lambda: tokenizer_json)
    yield trial
    await trial.close()


async def test_what_passes_is_prepared_and_measured(trial: GrammarTrial):
    passed = await trial.passed(of("json", '{"type": "integer", "title": "an age"}'))
    assert (passed.kind, passed.param) == ("llguidance", "here")
    assert "an age" not in passed.source
    assert passed.nbytes > 10_000
    again = await trial.passed(Structure(kind="json", source='{"type": "integer", "title": "an age"}', param="there"))
    assert (again.source, again.param) == (passed.source, "there")
    assert (await trial.passed(passed)).source == passed.source


REFUSED = [
    ("json", '{"uniqueItems": true}', "'uniqueItems'"),
    ("json", "{", "cannot be read"),
    ("json", '{"type": "string", "format": "phone"}', "phone"),
    ("json", '{"$ref": "#"}', "no text satisfies it"),
    ("json", '{"$ref": "#/$defs/a", "$defs": {"a": {"$ref": "#/$defs/b"}, "b": {"$ref": "#/$defs/a"}}}', "no text"),
    ("json", '{"$ref": "https://example.com/schema"}', "cannot be enforced"),
    ("json", '{"$ref": "#/$defs/missing"}', "missing"),
    ("json", '{"enum": []}', "cannot be enforced"),
    ("json", '{"minimum": 3, "maximum": 2, "type": "integer"}', "cannot be enforced"),
    ("json", '{"oneOf": [{"minimum": 3}, {"maximum": 5}]}', "oneOf"),
    ("json", '{"items":' * 60_000 + "{}" + "}" * 60_000, "64 levels"),
    ("json", "[" * 60_000 + "]" * 60_000, "64 levels"),
    ("regex", "(", "cannot be enforced"),
    ("regex", "(?=a)b", "cannot be enforced"),
    ("regex", "(" * 60_000 + "a" + ")" * 60_000, "cannot be enforced"),
    ("regex", "a" * (MAX_STRUCTURE_CHARS + 1), "at most"),
    ("choice", "[]", "must be a text"),
    ("choice", "[1]", "cannot be read"),
    ("grammar", "start: nobody", "nobody"),
    ("grammar", "root ::= (", "cannot be read"),
    ("grammar", "start: %json " + '{"items":' * 60_000 + "{}" + "}" * 60_000, "cannot be enforced"),
    ("grammar", "start: " + "(" * 60_000 + '"a"' + ")" * 60_000, "nested"),
]


async def test_what_cannot_be_enforced_is_refused_with_the_reason(trial: GrammarTrial):
    for kind, source, why in REFUSED:
        with pytest.raises(InvalidRequest, match=re.escape(why)) as caught:
            await trial.passed(of(kind, source))
        assert caught.value.param == "here"
        assert len(str(caught.value)) < 500


async def test_what_compiles_for_ever_or_needs_all_memory_is_refused_and_stops_nobody(trial: GrammarTrial):
    endless = asyncio.ensure_future(trial.passed(of("json", ENDLESS)))
    many = asyncio.ensure_future(
        trial.passed(of("json", json.dumps({"type": "object", "required": [f"k{i}" for i in range(100_000)]})))
    )
    await asyncio.sleep(0.2)
    assert not endless.done()
    with pytest.raises(InvalidRequest, match="longer than 2 s"):
        await endless
    with pytest.raises(InvalidRequest, match=r"longer than 2 s|too much memory"):
        await many
    assert await trial.passed(of("regex", "a+"))


async def test_catastrophic_regexes_and_huge_enums_are_no_matter(trial: GrammarTrial):
    assert await trial.passed(of("regex", "(a+)+(b*)*(.*.*.*=.*)+$"))
    assert await trial.passed(of("regex", "(((a{0,100}){0,100}){0,100}){0,100}"))
    assert await trial.passed(of("json", json.dumps({"enum": [f"value {i}" for i in range(5000)]})))


async def test_the_same_question_at_once_is_tried_once_and_cancelled_with_its_last_asker(trial: GrammarTrial):
    first, second = (asyncio.ensure_future(trial.passed(of("json", ENDLESS))) for _ in range(2))
    await trial.passed(of("regex", "warm"))
    first.cancel()
    await asyncio.wait([first])
    assert trial._num_trials == 2
    assert len(trial._answers) == 1
    second.cancel()
    await asyncio.wait([second])
    await asyncio.sleep(0)
    assert trial._answers == trial._asked == {}
    assert await trial.passed(of("regex", "b+"))


async def test_a_worker_that_dies_is_replaced(trial: GrammarTrial):
    assert await trial.passed(of("regex", "a"))
    waiting = asyncio.ensure_future(trial.passed(of("json", ENDLESS)))
    await trial.passed(of("regex", "b"))
    assert trial._process is not None
    os.kill(trial._process.pid, signal.SIGKILL)
    with pytest.raises(EngineOverloaded):
        await waiting
    assert await trial.passed(of("regex", "c"))


async def test_more_questions_than_a_limit_are_refused_at_once(trial: GrammarTrial):
    asked = [asyncio.ensure_future(trial.passed(of("json", ENDLESS + " " * i))) for i in range(64)]
    await asyncio.sleep(0)
    with pytest.raises(EngineOverloaded, match="64"):
        await trial.passed(of("regex", "a"))
    for task in asked:
        task.cancel()
    await asyncio.wait(asked)
    assert await trial.passed(of("regex", "a"))


async def test_a_tokenizer_that_cannot_be_taken_is_said_so():
    for to_json in (lambda: "{}", NumberTokenizer().to_json):
        trial = GrammarTrial(to_json)
        with pytest.raises(InvalidRequest, match="tokenizer"):
            await trial.passed(of("regex", "a"))
        await trial.close()
