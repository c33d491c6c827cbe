"""The pre-gate served by the engine, against transformers' Llama in its place and the model it is learned as."""

from __future__ import annotations

import random
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from cache.device import DEVICES
from cache.device.sim import Adversary, SimDevice
from cache.prefetcher import Prefetcher
from engine.errors import ConfigError
from engine.layers.foresight import ExactForesight
from engine.loader import expert_keys
from engine.models.spec import PregateSpec
from engine.refactor.dense import Rotary, embed
from engine.refactor.plan import PregatePlan, RefactorPlan, SplitSettings
from engine.refactor.pregate import PregateModel
from engine.refactor.source import DenseSource, open_source
from engine.refactor.write import write_checkpoint
from kernels.quant.formats import FORMATS
from tests.engine.conftest import MakeEngine, greedy, run_all, tokens_of
from tests.engine.refactor.conftest import MakeLlama
from tests.engine.refactor.moe_twin import PregatedTwin, load_twin
from tests.engine.refactor.test_write import random_plan
from tests.engine.test_models import all_logits
from tests.engine.test_offload import logprobs_of
from tests.engine.tiny_models import reference_logits

SETTINGS = SplitSettings(num_experts=4, shared_size=32, num_active=2, dense_layers=(1,))
SPEC = PregateSpec(hidden_size=32, num_layers=2, intermediate_size=48)


def pregated_plan(source: DenseSource) -> RefactorPlan:
    torch.manual_seed(4)
    model = PregateModel(source.config, SPEC, SETTINGS.num_experts, (0, 2))
    parameters = {name: (torch.randn_like(p) * 0.3).half() for name, p in model.named_parameters()}
    return replace(random_plan(source, SETTINGS), pregate=PregatePlan(SPEC, parameters))


@pytest.fixture
def pregated(make_llama: MakeLlama, tmp_path: Path):
    path, _ = make_llama(intermediate_size=160)
    source = open_source(path)
    plan = pregated_plan(source)
    write_checkpoint(source, plan, tmp_path / "moe", dtype="float32")
    prompt = random.Random(0).choices(range(source.config.vocab_size), k=60)
    return tmp_path / "moe", source, plan, prompt


@pytest.mark.parametrize("chunk", [1, 7, 1000])
def test_logits_equal_those_of_the_twin(pregated, make_engine: MakeEngine, chunk: int):
    path, _, _, prompt = pregated
    expected = PregatedTwin(path).logits(prompt)
    found = all_logits(make_engine(path, router="pregated"), prompt, chunk)
    torch.testing.assert_close(found, expected, atol=1e-3, rtol=0)
    layerwise = reference_logits(load_twin(path), prompt)
    assert (expected - layerwise).abs().max() > 0.1  # else the routers would not matter
    torch.testing.assert_close(all_logits(make_engine(path), prompt, chunk), layerwise, atol=1e-3, rtol=0)


def test_greedy_tokens_equal_those_of_the_twin_and_do_not_depend_on_the_batch(pregated, make_engine: MakeEngine):
    path, _, _, prompt = pregated
    expected = PregatedTwin(path).greedy(prompt, 24)
    prompts = {"a": (prompt, greedy(24)), "b": (prompt[:31], greedy(24)), "c": (prompt[5:], greedy(9))}
    engine = make_engine(path, router="pregated")
    together = {name: tokens_of(outputs) for name, outputs in run_all(engine, prompts).items()}
    assert together["a"] == expected
    for name, one in prompts.items():
        assert tokens_of(run_all(make_engine(path, router="pregated"), {name: one})[name]) == together[name]
    again = run_all(engine, {"d": (prompt, greedy(24))})["d"]  # with a prefix from the cache
    assert again[-1].num_cached_tokens > 0
    assert tokens_of(again) == expected


def test_pregated_tokens_and_logprobs_are_the_same_bits_whatever_the_expert_memory(pregated, make_engine: MakeEngine):
    path, _, _, prompt = pregated
    record = FORMATS["float32"].layout(32, 32).nbytes
    requests = {f"r{i}": (prompt[: 5 + 13 * i], greedy(12, logprobs=0)) for i in range(4)}
    results = []
    for num_slots in (8, 3, 1):  # two layers of four experts
        engine = make_engine(path, router="pregated", cache={"memory_nbytes": num_slots * record})
        outputs = run_all(engine, requests)
        results.append({r: (tokens_of(outputs[r]), logprobs_of(outputs[r])) for r in requests})
        assert (engine.stats().expert_cache.evictions > 0) == (num_slots < 8)
    assert results[0] == results[1]
    assert results[0] == results[2]


def test_what_is_prefetched_of_a_pregated_model_is_exactly_what_is_used(pregated, make_engine: MakeEngine):
    path, _, _, prompt = pregated
    record = FORMATS["float32"].layout(32, 32).nbytes
    requests = {"a": (prompt[:40], greedy(24))}
    alone, ahead = (
        make_engine(path, router="pregated", cache={"memory_nbytes": 6 * record, "predictor": "off"}) for _ in "ab"
    )
    keys = [expert_keys(ahead.moe, layer) for layer in ahead.moe.layers]
    ahead.observe(ExactForesight(Prefetcher(ahead.expert_cache, len(keys)), keys, always=True))
    assert tokens_of(run_all(ahead, requests)["a"]) == tokens_of(run_all(alone, requests)["a"])
    stats = ahead.stats().expert_cache
    issued = sum(p.issued for p in stats.prefetch.values())
    assert issued > 0
    assert not alone.stats().expert_cache.prefetch
    # in decode every miss was foretold, and nothing was ever read in vain
    assert stats.decode.queries == stats.decode.hits + stats.decode.joined
    assert sum(p.useful + p.late for p in stats.prefetch.values()) == issued
    assert stats.prefetch[1].predicted == stats.prefetch[1].routed > 0


def test_a_pregated_model_reads_ahead_only_while_that_is_no_slower(
    pregated, make_engine: MakeEngine, monkeypatch: pytest.MonkeyPatch
):
    path, _, _, prompt = pregated
    record = FORMATS["float32"].layout(32, 32).nbytes
    issued = []
    for is_worth_it in (False, True):
        monkeypatch.setattr(Prefetcher, "is_worth_it", is_worth_it)
        engine = make_engine(path, router="pregated", cache={"memory_nbytes": 6 * record})
        run_all(engine, {"a": (prompt[:40], greedy(24))})
        issued.append(sum(p.issued for p in engine.stats().expert_cache.prefetch.values()))
    assert issued[0] == 0 < issued[1]


def test_what_is_learned_computes_what_is_served(pregated):
    path, source, plan, prompt = pregated
    model = PregateModel(source.config, SPEC, SETTINGS.num_experts, (0, 2))
    model.load_state_dict({name: tensor.float() for name, tensor in plan.pregate.parameters.items()})
    with torch.inference_mode():
        logits = model(embed(source, torch.tensor([prompt])), Rotary.build(source.config, len(prompt)))[0]
    torch.testing.assert_close(logits.transpose(0, 1), PregatedTwin(path).routes(prompt), atol=1e-4, rtol=1e-4)


def test_a_plan_keeps_its_pregate(pregated, tmp_path: Path):
    _, _, plan, _ = pregated
    (tmp_path / "plan").write_bytes(plan.to_bytes())
    assert RefactorPlan.load(tmp_path / "plan").to_bytes() == plan.to_bytes()


def test_a_router_that_the_model_has_not_is_refused(checkpoint, make_engine: MakeEngine):
    path, _ = checkpoint("olmoe")
    with pytest.raises(ConfigError, match="has no pre-gate: its only router is layerwise"):
        make_engine(path, router="pregated")
    with pytest.raises(ConfigError, match="unknown router 'oracle'; known: auto, layerwise, pregated"):
        make_engine(path, router="oracle")


@pytest.mark.parametrize(
    "adversary", [Adversary(), Adversary(seed=1, compute_delay_s=0.003), Adversary(seed=2, copy_delay_s=0.002)]
)
def test_on_a_device_the_host_runs_ahead_of_all_layers_and_nothing_is_waited_for_unforetold(
    pregated, make_engine: MakeEngine, monkeypatch, adversary: Adversary
):
    path, _, _, prompt = pregated
    device = SimDevice(adversary=adversary)
    monkeypatch.setitem(DEVICES, "sim", lambda: device)
    record = FORMATS["float32"].layout(32, 32).nbytes
    requests = {"a": (prompt[:40], greedy(16, logprobs=0))}
    expected = run_all(make_engine(path, router="pregated"), requests)["a"]
    cache = {"memory_nbytes": 6 * record, "predictor": "off"}
    engine = make_engine(path, router="pregated", device="sim", cache=cache)
    keys = [expert_keys(engine.moe, layer) for layer in engine.moe.layers]
    engine.observe(ExactForesight(Prefetcher(engine.expert_cache, len(keys)), keys, always=True))
    outputs = run_all(engine, requests)["a"]
    assert tokens_of(outputs) == tokens_of(expected)
    assert logprobs_of(outputs) == logprobs_of(expected)
    device.detector.check()
    stats = engine.stats().expert_cache
    assert stats.evictions > 0
    assert stats.decode.queries == stats.decode.hits + stats.decode.joined  # each was there or on its way
