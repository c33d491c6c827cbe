"""loadtest/prompts.py, loadtest/options.py: what is asked, and what cannot be."""

from __future__ import annotations

import random
from collections import Counter
from pathlib import Path

import pytest

from loadtest.options import seconds
from loadtest.prompts import BUILT_IN, Prompts, built_in, from_file


def test_the_built_in_prompts_have_several_domains_none_of_them_thin() -> None:
    prompts = built_in()
    assert prompts.domains == sorted(BUILT_IN)
    for domain in prompts.domains:
        assert len({prompts.of([domain]).pick(random.Random(seed))[1] for seed in range(200)}) >= 10


def test_a_domain_is_as_likely_as_another_however_many_prompts_it_has() -> None:
    prompts, rng = Prompts({"few": ["a"], "many": [str(i) for i in range(99)]}), random.Random(1)
    counts = Counter(prompts.pick(rng)[0] for _ in range(1000))
    assert counts["few"] == pytest.approx(500, abs=60)


def test_a_file_has_a_prompt_a_line_or_json_with_domains(tmp_path: Path) -> None:
    text, jsonl = tmp_path / "mine.txt", tmp_path / "mine.jsonl"
    text.write_text("one\n\n  two  \n")
    assert {from_file(text).pick(random.Random(seed)) for seed in range(20)} == {("mine", "one"), ("mine", "two")}
    jsonl.write_text('{"prompt": "p\\nq", "domain": "d"}\n{"prompt": "r"}\n')
    assert {from_file(jsonl).pick(random.Random(seed)) for seed in range(20)} == {("d", "p\nq"), ("mine", "r")}


def test_what_is_no_prompt_is_refused_and_named(tmp_path: Path) -> None:
    bad, empty = tmp_path / "bad.jsonl", tmp_path / "empty.txt"
    bad.write_text('{"prompt": "p"}\n{"text": "q"}\n')
    empty.write_text("\n")
    with pytest.raises(ValueError, match="prompt 2: Object missing required field `prompt`"):
        from_file(bad)
    with pytest.raises(ValueError, match="there is no prompt"):
        from_file(empty)
    with pytest.raises(ValueError, match="unknown domain 'cooking'; known: "):
        built_in().of(["code", "cooking"])


def test_durations_are_read_as_people_write_them() -> None:
    assert [seconds(text) for text in ("90", "30s", "1.5m", "1h30m", "2m5s")] == [90, 30, 90, 5400, 125]
    for bad in ("", "s", "3 minutes", "-5", "1d"):
        with pytest.raises(ValueError, match="is no duration"):
            seconds(bad)
