"""Scoring text: against transformers' own likelihoods."""

from __future__ import annotations

import math

import pytest
import torch

from engine.errors import ConfigError, InvalidRequest
from engine.perplexity import measure_perplexity, read_text, score
from tests.engine.conftest import greedy
from tests.engine.test_models import random_prompt
from tests.engine.tiny_models import reference_logits


@pytest.mark.parametrize("budget", [16, 1000])
def test_scores_are_the_log_likelihoods_of_transformers(checkpoint, make_engine, budget: int):
    directory, model = checkpoint("olmoe")
    engine = make_engine(directory, scheduler={"max_num_seqs": 4, "max_num_batched_tokens": budget})
    tokens = random_prompt(75)
    expected = reference_logits(model, tokens)[:-1].log_softmax(-1).gather(1, torch.tensor(tokens[1:])[:, None])[:, 0]
    for _ in range(2):  # the second time they are in the prefix cache, which must not be asked
        torch.testing.assert_close(score(engine, tokens), expected, atol=1e-3, rtol=0)
        engine.check_integrity()


def test_perplexity_is_of_windows_spread_over_the_text(checkpoint, make_engine):
    engine = make_engine(checkpoint("olmoe")[0])
    text = "".join(chr(97 + i % 26) for i in range(100))
    tokens = engine.tokenizer.encode(text)
    window = len(tokens) // 5
    result = measure_perplexity(engine, text, window=window, max_windows=2)
    starts = (0, 5 * window // 2 // window * window)
    scores = torch.cat([score(engine, tokens[start : start + window]) for start in starts])
    assert (result.num_windows, result.num_tokens) == (2, 2 * (window - 1))
    assert math.isclose(result.perplexity, math.exp(-float(scores.double().mean())))
    with pytest.raises(ConfigError, match=r"the text has \d+ tokens; at least"):
        measure_perplexity(engine, "ab", window=64)


def test_a_busy_engine_does_not_score_and_bad_tokens_are_refused(checkpoint, make_engine):
    engine = make_engine(checkpoint("olmoe")[0])
    with pytest.raises(InvalidRequest):
        score(engine, [10**6, 1])
    engine.add_request("a", random_prompt(5), greedy(3))
    with pytest.raises(RuntimeError, match="only an idle engine"):
        score(engine, [1, 2])


def test_text_comes_from_files_or_from_python_itself(tmp_path):
    (tmp_path / "a.txt").write_text("one")
    (tmp_path / "b.txt").write_text("two")
    assert read_text([tmp_path / "a.txt", tmp_path / "b.txt"]) == "one\n\ntwo"
    assert len(read_text([])) > 100_000
    with pytest.raises(ConfigError, match="cannot read text"):
        read_text([tmp_path / "missing.txt"])
