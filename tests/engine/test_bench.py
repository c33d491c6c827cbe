from __future__ import annotations

from functools import partial
from pathlib import Path

import pytest

from engine import synthetic
from engine.async_engine import AsyncEngine
from engine.bench import Workload, bench_offline
from engine.bench_offload import bench_offload
from engine.config import CacheConfig, EngineConfig
from engine.errors import ConfigError, InvalidRequest
from engine.sampling_params import SamplingParams
from engine.synthetic import SyntheticCheckpoint, random_engine

TINY = synthetic.SHAPES["olmoe"] | {
    "vocab_size": 96,
    "hidden_size": 64,
    "intermediate_size": 32,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "num_experts": 8,
    "num_experts_per_tok": 2,
}


def test_a_synthetic_checkpoint_is_the_same_each_time_and_its_tensors_differ(tmp_path: Path, monkeypatch):
    monkeypatch.setitem(synthetic.SHAPES, "tiny", TINY)
    first, second = (SyntheticCheckpoint("tiny", 3, tmp_path) for _ in range(2))
    assert first.spec.num_layers == 3
    assert first.fingerprint == second.fingerprint != SyntheticCheckpoint("tiny", 4, tmp_path).fingerprint
    a, b = (first.tensor(f"model.layers.0.mlp.experts.{i}.up_proj.weight", (32, 64)) for i in (0, 1))
    assert a.equal(second.tensor("model.layers.0.mlp.experts.0.up_proj.weight", (32, 64)))
    assert not a.equal(b)
    assert 0.5 < a.std() * 8 < 2.0


def test_an_unknown_shape_is_answered_with_the_known_ones(tmp_path: Path):
    with pytest.raises(ConfigError, match="unknown shape 'gpt5'; known: olmoe, qwen3-30b-a3b, mixtral"):
        SyntheticCheckpoint("gpt5", None, tmp_path)


def test_the_bench_reports_each_batch_size_with_shares_that_can_be(monkeypatch):
    monkeypatch.setitem(synthetic.SHAPES, "tiny", TINY)
    config = EngineConfig(model=Path(), kv_memory_nbytes=2**22, cache=CacheConfig(format="int8"))
    workload = Workload(prompt_tokens=20, output_tokens=6)
    results = list(bench_offline(config, workload, random_shape="tiny", num_layers=2, batch_sizes=[1, 3]))
    assert [r.num_seqs for r in results] == [1, 3]
    for r in results:
        assert r.decode_tokens_per_s == pytest.approx(r.num_seqs / r.decode_step_ms * 1e3)
        assert r.prefill_tokens_per_s > 0
        assert 0 < r.outside_kernels < 1
        assert 0 <= r.stall < 1
        assert (r.of_reading_once is not None) == (r.num_seqs == 1)


def test_the_offload_bench_compares_predictors_with_an_oracle_on_the_same_bits(monkeypatch):
    monkeypatch.setitem(synthetic.SHAPES, "tiny", TINY)
    config = EngineConfig(model=Path(), kv_memory_nbytes=2**22, cache=CacheConfig(format="int8"))
    results = list(
        bench_offload(
            config,
            Workload(prompt_tokens=12, output_tokens=10, temperature=1.0),
            num_seqs=2,
            num_turns=2,
            memory_shares=[0.5],
            links=[None, 1e6],
            predictors=["off", "stale_gate", "oracle"],
            random_shape="tiny",
            num_layers=4,
        )
    )
    assert [(r.link_gib_per_s, r.predictor) for r in results] == [
        (link, name) for link in (None, 1e6 / 1024**3) for name in ("off", "stale_gate", "oracle")
    ]
    for r in results:
        assert r.same_bits
        assert 0 < r.hit_rate <= 1
        assert r.hit_rate < 1 or r.predictor == "oracle"  # which may find all in time
        assert r.read_mb_per_token > 0
    for same_link in (results[:3], results[3:]):
        off, _, oracle = same_link
        assert off.recovered in (None, pytest.approx(0.0))  # None: the oracle was not faster, on so small a model
        assert oracle.recovered in (None, pytest.approx(1.0))
    # a record takes 12 ms of the throttled link
    assert results[3].stall_ms_per_token > 5 * results[3].resident_step_ms


async def test_random_weights_are_served_like_a_checkpoint_with_numbers_for_text(tmp_path: Path, monkeypatch):
    monkeypatch.setitem(synthetic.SHAPES, "tiny", TINY)
    config = EngineConfig(model=tmp_path / "random", kv_memory_nbytes=2**22, kernels="reference")
    engine = AsyncEngine(config, build=partial(random_engine, "tiny", 2))
    await engine.start()
    try:
        prompt = await engine.encode("12 7 95")
        params = SamplingParams(temperature=0.0, max_tokens=5, ignore_eos=True)
        outputs = [output async for output in engine.generate("a", prompt, params)]
        tokens = [token_id for output in outputs for token_id in output.token_ids]
        assert len(tokens) == 5
        assert "".join(output.text for output in outputs) == await engine.decode(tokens)
        assert engine.info.name == "random"
        with pytest.raises(InvalidRequest, match="token ids or their numbers"):
            await engine.encode("hello")
        with pytest.raises(InvalidRequest, match="no chat template"):
            await engine.render_chat([{"role": "user", "content": "hi"}])
        assert await engine.integrity_error() is None
    finally:
        await engine.stop()
