"""What is read ahead changes no bit, and what is recorded is what was routed."""

from __future__ import annotations

import numpy as np
import pytest

from cache.trace import load
from engine.errors import ConfigError
from kernels.quant.formats import FORMATS
from tests.engine.conftest import greedy, run_all, tokens_of
from tests.engine.test_models import random_prompt
from tests.engine.test_offload import logprobs_of


def test_a_recorded_trace_has_every_token_of_every_request_once(checkpoint, make_engine, tmp_path):
    directory, _ = checkpoint("olmoe")
    requests = {f"r{i}": (random_prompt(5 + 9 * i, seed=i), greedy(6)) for i in range(4)}
    engine = make_engine(directory, record_trace=tmp_path / "a" / "trace.npz", scheduler={"max_num_batched_tokens": 32})
    outputs = run_all(engine, requests)
    engine.close()
    trace = load(tmp_path / "a" / "trace.npz")
    moe = engine._spec.moe
    assert (trace.num_experts, trace.layers, trace.ids.shape[2]) == (moe.num_experts, moe.layers, moe.num_active)
    assert trace.num_prompt.tolist() == [5, 14, 23, 32]
    assert np.diff(trace.seq_off).tolist() == [10, 19, 28, 37]  # the last token of an answer is never computed
    expected = [t for r, (prompt, _) in requests.items() for t in [*prompt, *tokens_of(outputs[r])[:-1]]]
    assert trace.token_ids.tolist() == expected
    assert all(len(set(row)) == moe.num_active for row in trace.ids[:, 0].tolist())


def test_recording_ends_when_the_trace_is_full(checkpoint, make_engine, tmp_path, caplog, monkeypatch):
    monkeypatch.setattr("engine.recordings.MAX_TRACE_TOKENS", 12)
    directory, _ = checkpoint("olmoe")
    engine = make_engine(directory, record_trace=tmp_path / "trace.npz")
    run_all(engine, {"a": (random_prompt(10, seed=0), greedy(20))})
    engine.close()
    assert load(tmp_path / "trace.npz").num_tokens == 12
    assert "trace.npz is full" in caplog.text


def test_a_trace_that_cannot_be_written_is_refused_at_the_start(checkpoint, make_engine, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="cannot write routing trace"):
        make_engine(checkpoint("olmoe")[0], record_trace=tmp_path / "file" / "trace.npz")
    with pytest.raises(ConfigError, match="no experts whose routing could be recorded"):
        make_engine(checkpoint("llama-llama3-rope")[0], record_trace=tmp_path / "trace.npz")


@pytest.mark.parametrize("predictor", ["off", "stale_gate", "history+token", "auto"])
def test_tokens_and_logprobs_are_the_same_bits_whatever_is_read_ahead(checkpoint, make_engine, predictor: str):
    directory, _ = checkpoint("olmoe")
    requests = {f"r{i}": (random_prompt(5 + 9 * i, seed=i), greedy(24, logprobs=0)) for i in range(3)}
    expected = run_all(make_engine(directory), requests)
    record = FORMATS["float32"].layout(64, 32).nbytes
    engine = make_engine(
        directory, cache={"memory_nbytes": 12 * record, "predictor": predictor, "link_bandwidth": 2000.0 * record}
    )
    outputs = run_all(engine, requests)
    for r in requests:
        assert tokens_of(outputs[r]) == tokens_of(expected[r])
        assert logprobs_of(outputs[r]) == logprobs_of(expected[r])
    prefetch = engine.stats().expert_cache.prefetch
    assert bool(sum(p.issued for p in prefetch.values())) == (predictor != "off")


def test_an_unknown_predictor_is_answered_with_the_known_ones(checkpoint, make_engine):
    with pytest.raises(ConfigError, match="unknown predictor 'oracle'; known: auto, off"):
        make_engine(checkpoint("olmoe")[0], cache={"predictor": "oracle"})
