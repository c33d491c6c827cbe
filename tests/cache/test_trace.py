"""Traces survive a file, and files that are not what they should be are refused with their names."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from cache.trace import concatenate, in_turns, load, load_all
from tests.cache.synthetic_traces import REAL_TRACES, random_trace

TRACE = random_trace(0, [4, 1, 7], num_prompt=1)


def test_a_trace_is_what_was_saved(tmp_path: Path):
    for trace in (TRACE, replace(TRACE, token_ids=np.arange(12))):
        trace.save(tmp_path / "t.npz")
        again = load(tmp_path / "t.npz")
        assert (again.ids == trace.ids).all()
        assert (again.seq_off == trace.seq_off).all()
        assert (again.num_prompt == trace.num_prompt).all()
        assert (again.num_experts, again.layers, again.domains) == (6, (1, 2, 3), ("synthetic",) * 3)
        assert (again.token_ids is None) == (trace.token_ids is None)


def test_requests_are_selected_as_a_slice_would_and_joined_again():
    parts = [TRACE.select(0, 1), TRACE.select(1, 99)]
    assert [part.num_requests for part in parts] == [1, 2]
    assert (parts[1].ids == TRACE.ids[4:]).all()
    joined = concatenate(parts)
    assert (joined.ids == TRACE.ids).all()
    assert joined.seq_off.tolist() == [0, 4, 5, 12]
    assert TRACE.select(2, 1).num_tokens == 0
    with pytest.raises(ValueError, match="different models"):
        concatenate([TRACE, random_trace(0, [3], num_layers=2)])


@pytest.mark.parametrize(
    ("changed", "why"),
    [
        ({"num_experts": 5}, "expert 5 of 5"),
        ({"layers": (1, 2)}, "3 layers"),
        ({"layers": (1, 3, 2)}, "ascending"),
        ({"seq_off": np.asarray([0, 4, 5, 11])}, "offsets"),
        ({"seq_off": np.asarray([0, 5, 4, 12])}, "offsets"),
        ({"num_prompt": np.asarray([1, 2, 1])}, "prompts"),
        ({"domains": ("one",)}, "domains"),
        ({"token_ids": np.arange(3)}, "token id"),
        ({"ids": TRACE.ids.astype(np.float32)}, "float32"),
    ],
)
def test_parts_that_contradict_each_other_are_refused(changed: dict, why: str):
    with pytest.raises(ValueError, match=why):
        replace(TRACE, **changed)


def damage(path: Path, **changed: object) -> None:
    with np.load(path) as arrays:
        parts = {**arrays, **changed}
    np.savez(path, **{name: part for name, part in parts.items() if part is not None})


@pytest.mark.parametrize(
    ("changed", "why"),
    [
        ({"format_version": np.int64(9)}, "version 9, this Foregate reads version 1"),
        ({"format_version": None}, "does not say its number of experts"),
        ({"ids": None}, "has no 'ids'"),
        ({"num_experts": np.int64(2)}, "of 2"),
        ({"layer_index": np.asarray([1, 2])}, "layer ids"),
        ({"ids": np.asarray([None])}, "pickle"),
    ],
)
def test_a_damaged_file_is_refused_with_its_name_and_why(tmp_path: Path, changed: dict, why: str):
    path = tmp_path / "t.npz"
    TRACE.save(path)
    damage(path, **changed)
    with pytest.raises(ValueError, match=rf"t\.npz cannot be used.*{why}"):
        load(path)


@pytest.mark.parametrize("keep", [0, 10, 200, -30])
def test_a_file_that_is_cut_short_is_refused(tmp_path: Path, keep: int):
    path = tmp_path / "t.npz"
    TRACE.save(path)
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(ValueError, match=r"t\.npz"):
        load(path)


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"prompts": {}, "num_experts": 3}', '{"prompts": {"a": {}}}'])
def test_json_that_is_no_trace_is_refused(tmp_path: Path, text: str):
    (tmp_path / "t.json").write_text(text)
    with pytest.raises(ValueError, match=r"t\.json"):
        load(tmp_path / "t.json")


def test_json_and_published_layouts_are_read(tmp_path: Path):
    tokens = TRACE.ids.tolist()
    prompts = {"code": {"prefill": tokens[:4], "decode": tokens[4:5]}, "prose": {"prefill": [], "decode": tokens[5:]}}
    (tmp_path / "a.json").write_text(json.dumps({"num_experts": 6, "prompts": prompts}))
    read = load(tmp_path / "a.json")
    assert (read.ids == TRACE.ids).all()
    assert (read.domains, read.num_prompt.tolist(), read.layers) == (("code", "prose"), [4, 0], (0, 1, 2))
    path = tmp_path / "gpt-oss-20b.mmlu.0.npz"
    np.savez(path, ids=TRACE.ids, seq_off=TRACE.seq_off.astype(np.int32), is_decode=np.asarray([0, 0] + [1] * 10))
    read = load(path)
    assert (read.num_experts, read.domains[0], read.num_prompt.tolist()) == (32, "mmlu", [2, 0, 0])
    assert read.token_ids is None
    assert [len(load_all(tmp_path)), len(load_all(path))] == [2, 1]
    likeness = np.arange(12, dtype=np.uint32) + 2**31
    np.savez(path, ids=TRACE.ids, seq_off=TRACE.seq_off.astype(np.int32), tok_crc32=likeness)
    tokens_read = load(path).token_ids
    assert tokens_read is not None
    assert tokens_read.tolist() == likeness.tolist()
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="no routing traces"):
        load_all(tmp_path / "empty")


@pytest.mark.skipif(not REAL_TRACES.is_dir(), reason="the real traces are not here")
@pytest.mark.parametrize(
    ("folder", "experts", "first_layer", "num_requests"),
    [
        ("gpt-oss-20b", 32, 0, 191),
        ("deepseek-v2-lite", 64, 1, 140),
        ("granite-3.0-1b-a400m", 32, 0, 3),
        ("qwen1.5-moe-a2.7b", 60, 0, 3),
    ],
)
def test_real_traces_are_read(folder: str, experts: int, first_layer: int, num_requests: int):
    trace = concatenate(load_all(REAL_TRACES / folder))
    assert (trace.num_experts, trace.layers[0], trace.num_requests) == (experts, first_layer, num_requests)


def test_the_domains_of_a_mixed_workload_take_turns():
    parts = [random_trace(seed, [3 + seed] * num) for seed, num in ((0, 3), (1, 1), (2, 2))]
    named = [replace(part, domains=(name,) * part.num_requests) for part, name in zip(parts, "abc", strict=True)]
    mixed = in_turns(concatenate(named))
    assert mixed.domains == ("a", "b", "c", "a", "c", "a")
    assert np.diff(mixed.seq_off).tolist() == [3, 4, 5, 3, 5, 3]
    np.testing.assert_array_equal(mixed.ids[3:7], parts[1].ids)
