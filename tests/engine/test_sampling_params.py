from __future__ import annotations

import pytest

from engine.config import CacheConfig, EngineConfig, SchedulerConfig, format_nbytes, parse_nbytes
from engine.errors import ConfigError, InvalidRequest
from engine.sampling_params import SamplingParams


@pytest.mark.parametrize(
    ("param", "value"),
    [
        ("max_tokens", -1),
        ("max_tokens", -5),
        ("min_tokens", -1),
        ("temperature", -0.1),
        ("temperature", 2.1),
        ("temperature", float("nan")),
        ("top_p", 0.0),
        ("top_p", 1.1),
        ("top_k", -1),
        ("min_p", 1.5),
        ("min_p", float("inf")),
        ("seed", 2**64),
        ("repetition_penalty", 0.0),
        ("repetition_penalty", 1e-320),  # would make a logit infinite
        ("repetition_penalty", float("nan")),
        ("presence_penalty", 3.0),
        ("frequency_penalty", -3.0),
        ("logit_bias", {5: 101.0}),
        ("logit_bias", {-1: 1.0}),
        ("stop", ("",)),
        ("stop", ("x",) * 17),
        ("stop_token_ids", (-1,)),
        ("logprobs", 21),
        ("logprobs", -1),
    ],
)
def test_a_value_that_cannot_be_is_refused_by_its_name(param: str, value: object):
    with pytest.raises(InvalidRequest, match=param) as caught:
        SamplingParams(**{param: value})  # type: ignore[arg-type]
    assert caught.value.param == param


def test_min_tokens_above_max_tokens_is_refused():
    with pytest.raises(InvalidRequest, match="min_tokens 5 is above max_tokens 4"):
        SamplingParams(min_tokens=5, max_tokens=4)


@pytest.mark.parametrize(
    ("text", "nbytes"),
    [("512MiB", 2**29), ("2GiB", 2**31), ("1.5 gib", 3 * 2**29), ("64k" + "b", 65536), ("4096", 4096)],
)
def test_sizes_are_read_as_people_write_them(text: str, nbytes: int):
    assert parse_nbytes(text) == nbytes


@pytest.mark.parametrize("text", ["", "lots", "-1GiB", "5 parsecs", "1e9"])
def test_a_size_that_cannot_be_read_is_answered_with_an_example(text: str):
    with pytest.raises(ConfigError, match="write it like 512MiB or 2GiB"):
        parse_nbytes(text)


def test_sizes_are_shown_readably():
    assert [format_nbytes(n) for n in (12, 2048, 2**29, 3 * 2**29, 5 * 2**40)] == [
        "12B",
        "2.0KiB",
        "512.0MiB",
        "1.5GiB",
        "5.0TiB",
    ]


@pytest.mark.parametrize(
    ("kwargs", "why"),
    [
        ({"dtype": "float8"}, "unknown dtype"),
        ({"max_model_len": 0}, "max_model_len must be at least 1"),
        ({"cache": CacheConfig(memory_nbytes=0)}, "expert_memory must be at least 1"),
        ({"scheduler": SchedulerConfig(max_num_seqs=64, max_num_batched_tokens=32)}, "must be at least max_num_seqs"),
    ],
)
def test_settings_that_cannot_work_are_refused(tmp_path, kwargs: dict, why: str):
    with pytest.raises(ConfigError, match=why):
        EngineConfig(model=tmp_path, **kwargs)
