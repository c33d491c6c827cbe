"""Answers with a structure, through the whole engine: always in the grammar, and nobody else notices."""

from __future__ import annotations

import json
import random
import re
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jsonschema_rs
import pytest
import torch

from engine.constraints import Constraints
from engine.engine import Engine
from engine.messages import RequestOutput
from engine.sampling_params import SamplingParams, Structure
from tests.engine.conftest import MakeEngine, greedy, run_all, tokens_of
from tests.engine.test_models import random_prompt
from tests.engine.tiny_models import EOS_ID, reference_logits

Checkpoint = Callable[[str], tuple[Path, torch.nn.Module]]


def of(kind: str, source: Any) -> Structure:
    text = source if isinstance(source, str) else json.dumps(source)
    return Structure(kind=kind, source=text, param="structure")  # type: ignore[arg-type]


def text_of(outputs: list[RequestOutput]) -> str:
    return "".join(output.text for output in outputs)


@pytest.fixture
def engine(checkpoint: Checkpoint, make_engine: MakeEngine) -> Engine:
    return make_engine(checkpoint("olmoe")[0], scheduler={"max_num_seqs": 8})


def answer(engine: Engine, structure: Structure, **params: Any) -> list[RequestOutput]:
    sampling = SamplingParams(**{"max_tokens": 100, "seed": 1, **params}, structure=structure)
    return run_all(engine, {"a": (random_prompt(12), sampling)})["a"]


def test_greedy_takes_the_likeliest_of_the_tokens_that_are_allowed(checkpoint: Checkpoint, engine: Engine):
    _, model = checkpoint("olmoe")
    outputs = answer(engine, of("regex", "[a-m]{9}"), temperature=0.0)
    tokens = random_prompt(12)
    for _ in range(9):
        logits = reference_logits(model, tokens)[-1]
        tokens.append(max(range(ord("a"), ord("m") + 1), key=lambda token: float(logits[token])))
    assert tokens_of(outputs) == tokens[12:]
    assert (outputs[-1].finish_reason, outputs[-1].stop_reason) == ("stop", None)


@pytest.mark.parametrize(
    ("structure", "pattern"),
    [
        (of("regex", r"\d{3}-\w+\s\w"), r"[0-9]{3}-[A-Za-z0-9_]+\s[A-Za-z0-9_]"),
        (of("choice", ["a", "ab", "abc", "", "(a|b)*"]), r"a|ab|abc||\(a\|b\)\*"),
        (of("choice", ["日本", 'he said "\\d"\n']), r'日本|he said "\\d"\n'),
        (of("grammar", 'start: "x" start "y" | "z"'), r"x*zy*"),
        (of("grammar", 'root ::= "a" [0-9]+ b\nb ::= "c" | "d"'), r"a[0-9]+[cd]"),
    ],
)
def test_an_answer_is_in_its_language(engine: Engine, structure: Structure, pattern: str):
    for seed in range(6):
        outputs = answer(engine, structure, seed=seed)
        assert outputs[-1].finish_reason == "stop"
        assert re.fullmatch(pattern, text_of(outputs)), text_of(outputs)


def test_every_choice_is_chosen_some_time(engine: Engine):
    choices = of("choice", ["a", "ab", "abc", ""])
    requests = {
        str(seed): ([1, 2], SamplingParams(seed=seed, temperature=2.0, logit_bias={EOS_ID: 4.0}, structure=choices))
        for seed in range(60)
    }
    outputs = run_all(engine, requests)
    assert {text_of(outputs[name]) for name in requests} == {"a", "ab", "abc", ""}


def random_schema(rng: random.Random, depth: int = 0) -> Any:
    """Schemas of all that is enforced, of which even random tokens soon make an instance."""
    kinds = ["integer", "number", "string", "boolean", "null", "enum", "const", "pattern", "format", "types"]
    if depth < 3:
        kinds += ["object", "array", "anyOf", "tuple", "map", "ref", "allOf"] * 2
    kind = rng.choice(kinds)
    low = rng.randrange(-50, 50)
    more = {"title": "T", "description": "d"} if rng.random() < 0.3 else {}
    if kind == "integer":
        return {"type": "integer", "minimum": low, rng.choice(["maximum", "exclusiveMaximum"]): low + 30, **more}
    if kind == "number":
        return {"type": "number", "minimum": low / 4, "maximum": low / 4 + rng.randrange(1, 40), **more}
    if kind == "string":
        length = rng.randrange(4)
        return {"type": "string", "minLength": length, "maxLength": length + rng.randrange(3), **more}
    if kind in ("boolean", "null"):
        return {"type": kind, **more}
    if kind == "enum":
        return {"enum": rng.sample([1, "one", None, True, [1, {"a": 2}], "ünï", 2.5, {}], 3)}
    if kind == "const":
        return {"const": rng.choice([0, "x\ny", {"a": [1]}, False])}
    if kind == "pattern":
        return {"type": "string", "pattern": rng.choice(["^[a-c]{2,4}$", "^(yes|no)$", r"^\d{2}\.$", "^a?b?$"])}
    if kind == "format":
        return {"type": "string", "format": rng.choice(["date", "ipv4", "uuid"])}
    if kind == "types":
        return {"type": rng.sample(["boolean", "null", "integer"], 2), "minimum": 3, "maximum": 12}
    if kind == "object":
        names = rng.sample(["a", "b", "c d", "é", '"q"'], rng.randrange(4))
        properties = {name: random_schema(rng, depth + 1) for name in names}
        required = [name for name in names if rng.random() < 0.7]
        return {"type": "object", "properties": properties, "required": required, "additionalProperties": False, **more}
    if kind == "array":
        least = rng.randrange(3)
        items = random_schema(rng, depth + 1)
        return {"type": "array", "items": items, "minItems": least, "maxItems": least + rng.randrange(3)}
    if kind == "anyOf":
        return {"anyOf": [random_schema(rng, depth + 1) for _ in range(2)]}
    if kind == "tuple":
        items = [random_schema(rng, depth + 1) for _ in range(2)]
        return {"type": "array", "prefixItems": items, "items": False, "minItems": 2}
    if kind == "map":
        return {"type": "object", "patternProperties": {"^k[0-9]$": random_schema(rng, depth + 1)},
                "additionalProperties": False, "maxProperties": 2}  # fmt: skip
    if kind == "allOf":
        return {"type": "integer", "allOf": [{"minimum": low}, {"maximum": low + 9}]}
    # may refer to itself, where that can end
    return {
        "$defs": {"node": {"type": "object", "properties": {"v": {"type": "boolean"}}, "required": ["v"],
                           "additionalProperties": False}},
        "type": "array", "items": {"$ref": "#/$defs/node"}, "maxItems": 2,
    } if depth == 0 else {"type": "boolean"}  # fmt: skip


def test_what_random_weights_write_by_a_random_schema_is_valid(engine: Engine):
    rng = random.Random(7)
    schemas = [random_schema(rng) for _ in range(80)]
    finished = 0
    for start in range(0, len(schemas), 8):
        batch = {
            str(i): (
                random_prompt(6, seed=i),
                SamplingParams(
                    max_tokens=180, seed=i, temperature=1.0 if i % 3 else 0.0, structure=of("json", schemas[i])
                ),
            )
            for i in range(start, start + 8)
        }
        for name, outputs in run_all(engine, batch).items():
            schema, text = schemas[int(name)], text_of(outputs)
            assert outputs[-1].finish_reason in ("stop", "length"), (schema, outputs[-1])
            if outputs[-1].finish_reason == "stop":
                finished += 1
                assert jsonschema_rs.is_valid(schema, json.loads(text), validate_formats=True), (schema, text)
    assert finished > 60


def test_a_likeliest_token_that_is_allowed_is_taken_as_with_all_that_are(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
):
    rng = random.Random(3)
    structures = [of("json", random_schema(rng)) for _ in range(40)]
    structures += [of("regex", source) for source in ("[a-z]{3,40}", r"(\w+ ){3}x", "(.|\n){1,30}", "[^a]*")]
    structures += [of("json", {}), of("choice", ["a", "ab", "abc"])] * 4
    requests = {
        str(i): (random_prompt(6, seed=i), SamplingParams(max_tokens=60, temperature=0.0, structure=structure))
        for i, structure in enumerate(structures)
    }
    masked: list[int] = []
    masks = Constraints.masks
    monkeypatch.setattr(
        Constraints, "masks", lambda self, of, which: masked.append(len(which)) or masks(self, of, which)
    )
    taken = {name: tokens_of(outputs) for name, outputs in run_all(engine, requests).items()}
    num_masked = sum(masked)
    monkeypatch.setattr("engine.choosing._is_settled", lambda request, chosen: request.matcher is None)
    masked.clear()
    assert {name: tokens_of(outputs) for name, outputs in run_all(engine, requests).items()} == taken
    assert 0 < num_masked < sum(masked)


def test_max_tokens_cuts_an_answer_and_says_so(engine: Engine):
    outputs = answer(engine, of("regex", "a{50}"), max_tokens=7)
    assert (text_of(outputs), outputs[-1].finish_reason) == ("aaaaaaa", "length")


def test_stop_strings_and_penalties_and_logprobs_work_as_ever(engine: Engine):
    outputs = answer(engine, of("regex", "[ab]{40}"), stop=("ab",), temperature=1.0)
    assert outputs[-1].stop_reason == "ab"
    assert "ab" not in text_of(outputs)
    outputs = answer(engine, of("regex", "[abc]{30}"), temperature=0.0, frequency_penalty=2.0, repetition_penalty=2.0,
                     presence_penalty=1.0, logit_bias={ord("z"): 100.0, ord("a"): 1.0}, logprobs=3)  # fmt: skip
    assert re.fullmatch("[abc]{30}", text_of(outputs))
    assert len(set(text_of(outputs))) == 3
    # of the model's own distribution, where other tokens may be likelier
    assert all(len(output.logprobs or []) == 1 for output in outputs)
    assert any(output.logprobs[0].top[0].token not in (b"a", b"b", b"c") for output in outputs if output.logprobs)


def test_the_end_comes_only_where_the_grammar_allows_it(engine: Engine):
    for seed in range(5):
        outputs = answer(engine, of("regex", "a{3,6}"), logit_bias={EOS_ID: 100.0}, seed=seed)
        assert (text_of(outputs), outputs[-1].finish_reason) == ("aaa", "stop")


def test_min_tokens_and_ignore_eos_keep_an_answer_from_ending_only_where_it_can_go_on(engine: Engine):
    end = {EOS_ID: 100.0}
    outputs = answer(engine, of("regex", "a{3,60}"), logit_bias=end, min_tokens=20)
    assert (text_of(outputs), outputs[-1].finish_reason) == ("a" * 20, "stop")
    outputs = answer(engine, of("regex", "a{3,60}"), logit_bias=end, ignore_eos=True)
    assert (text_of(outputs), outputs[-1].finish_reason) == ("a" * 60, "stop")
    outputs = answer(engine, of("regex", "a{3}"), min_tokens=20, ignore_eos=True)
    assert (text_of(outputs), outputs[-1].finish_reason) == ("aaa", "stop")


def test_preemption_and_the_batch_change_no_token(checkpoint: Checkpoint, make_engine: MakeEngine, engine: Engine):
    schema = {"type": "array", "items": {"type": "integer"}, "minItems": 30}
    structured = {
        f"s{i}": (random_prompt(20, seed=i), SamplingParams(max_tokens=70, seed=i, structure=of("json", schema)))
        for i in range(3)
    }
    free = {f"f{i}": (random_prompt(20, seed=10 + i), greedy(70)) for i in range(3)}
    requests = {**structured, **free}
    alone = {name: tokens_of(run_all(engine, {name: request})[name]) for name, request in requests.items()}
    tight = make_engine(checkpoint("olmoe")[0], kv_memory_nbytes=2**20 // 8, max_model_len=112)
    together = run_all(tight, requests)
    assert tight.stats().preemptions_total > 0
    assert {name: tokens_of(outputs) for name, outputs in together.items()} == alone


def test_a_grammar_that_becomes_too_complex_fails_its_request_alone(engine: Engine):
    rx = "(((((((a{0,100}){0,100}){0,100}){0,100}){0,100}){0,100}){0,100})"
    outputs = run_all(
        engine,
        {
            "bad": ([1, 2], SamplingParams(max_tokens=60, seed=0, logit_bias={97: 90.0}, structure=of("regex", rx))),
            "good": ([1, 2], SamplingParams(max_tokens=60, seed=0, structure=of("regex", "a{40}"))),
        },
    )
    assert outputs["bad"][-1].finish_reason == "error"
    refusal = outputs["bad"][-1].refusal
    assert refusal is not None
    assert (refusal.param, refusal.code) == ("structure", "grammar_too_complex")
    assert re.match(r"structure: too complex to be enforced beyond token \d+ of the answer", str(refusal))
    assert (text_of(outputs["good"]), outputs["good"][-1].finish_reason) == ("a" * 40, "stop")


def test_what_cannot_be_compiled_fails_its_request_alone(engine: Engine):
    outputs = run_all(
        engine, {"bad": ([1], SamplingParams(structure=of("json", {"uniqueItems": True}))), "good": ([1], greedy(5))}
    )
    refusal = outputs["bad"][-1].refusal
    assert refusal is not None
    assert "'uniqueItems'" in str(refusal)
    assert refusal.param == "structure"
    assert len(tokens_of(outputs["good"])) == 5


def test_others_run_while_a_grammar_is_compiled_and_a_waiting_request_can_be_aborted(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
):
    may_go_on, compile = threading.Event(), Constraints._compile

    def slowly(self: Constraints, structure: Structure) -> Any:
        may_go_on.wait(20)
        return compile(self, structure)

    monkeypatch.setattr(Constraints, "_compile", slowly)
    for name, source in (("a", "x{9}"), ("b", "x{9}"), ("c", "y{9}"), ("d", "z{9}")):
        engine.add_request(name, [1, 2, 3], SamplingParams(max_tokens=20, structure=of("regex", source)))
    assert (engine.has_work, engine.step(), engine.stats().num_waiting) == (True, [], 4)
    assert len(tokens_of(run_alone(engine, "free"))) == 8
    engine.abort_request("a")
    engine.abort_request("d")
    engine.check_integrity()
    may_go_on.set()
    outputs: dict[str, str] = {}
    while engine.has_work:
        for output in engine.step():
            outputs[output.request_id] = outputs.get(output.request_id, "") + output.text
    assert outputs == {"b": "x" * 9, "c": "y" * 9}


def run_alone(engine: Engine, name: str) -> list[RequestOutput]:
    engine.add_request(name, [1, 2], greedy(8))
    outputs: list[RequestOutput] = []
    while not outputs or outputs[-1].finish_reason is None:
        outputs += engine.step()
    return outputs


def test_a_grammar_is_compiled_once_as_long_as_the_cache_holds_it(engine: Engine, monkeypatch: pytest.MonkeyPatch):
    compiled: list[str] = []
    compile = Constraints._compile
    monkeypatch.setattr(
        Constraints, "_compile", lambda self, structure: compiled.append(structure.source) or compile(self, structure)
    )
    for source in ("a", "b", "a", "b"):
        answer(engine, of("regex", source))
    assert compiled == ["a", "b"]
    engine._constraints._cache._max_nbytes = 600 * 1024  # one grammar's
    for source in ("c", "d", "c"):
        answer(engine, of("regex", source))
    assert compiled == ["a", "b", "c", "d", "c"]
    assert engine._constraints._cache.nbytes <= 600 * 1024
