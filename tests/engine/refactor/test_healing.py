"""Healing: exact, the same on any machine, and applied to the weights it names."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from engine.errors import CheckpointError
from engine.refactor.healing import NORMS, HealedSource, Healing, product_sizes
from engine.refactor.llama_config import LlamaConfig
from engine.refactor.plan import RefactorPlan
from engine.refactor.source import open_source
from engine.refactor.write import write_checkpoint
from tests.engine.refactor.conftest import MakeLlama
from tests.engine.refactor.moe_twin import load_tensors
from tests.engine.refactor.test_write import files, random_plan


def random_healing(config: LlamaConfig, rank: int = 3, scale: float = 0.1) -> Healing:
    generator = torch.Generator().manual_seed(5)

    def values(*shape: int) -> torch.Tensor:
        return (torch.randn(shape, generator=generator) * scale).half()

    layers = tuple(range(1, config.num_hidden_layers))
    factors = {
        name: (values(len(layers), rank, inputs), values(len(layers), outputs, rank))
        for name, (outputs, inputs) in product_sizes(config).items()
    }
    norms = {name: values(len(layers), config.hidden_size) for name in NORMS}
    return Healing(layers, factors, norms, values(config.hidden_size))


def test_each_weight_is_the_dense_one_plus_its_rows_of_the_product(make_llama: MakeLlama):
    path, dense = make_llama()
    source = open_source(path)
    healing = random_healing(source.config)
    healed = HealedSource(source, healing)
    state = dense.state_dict()
    rows = {"gate_up": ["mlp.gate_proj", "mlp.up_proj"], "o": ["self_attn.o_proj"], "down": ["mlp.down_proj"]}
    rows["qkv"] = [f"self_attn.{p}_proj" for p in "qkv"]
    for layer in (1, 2):
        for product, names in rows.items():
            a, b = healing.factors[product]
            parts = [f"model.layers.{layer}.{name}.weight" for name in names]
            found = torch.cat([healed.tensor(name) for name in parts])
            expected = torch.cat([state[name] for name in parts]) + (b[layer - 1].double() @ a[layer - 1].double())
            assert (found - torch.cat([state[name] for name in parts])).abs().max() > 0.01
            torch.testing.assert_close(found, expected.float(), atol=0, rtol=0)
    assert torch.equal(healed.tensor("model.norm.weight"), healing.final_norm.float())
    norm = "model.layers.{}.input_layernorm.weight"
    assert torch.equal(healed.tensor(norm.format(2)), healing.norms["input_layernorm"][1].float())
    for name in (norm.format(0), "model.layers.0.mlp.up_proj.weight"):  # layer 0 is not healed
        assert torch.equal(healed.tensor(name), state[name])
    assert torch.equal(healed.tensor("model.embed_tokens.weight"), state["model.embed_tokens.weight"])


def test_the_sum_is_exact_so_that_its_order_does_not_matter(make_llama: MakeLlama):
    source = open_source(make_llama()[0])
    healing = random_healing(source.config, rank=16, scale=0.3)
    a, b = (factor[0].double() for factor in healing.factors["down"])
    order = torch.randperm(16, generator=torch.Generator().manual_seed(0)).tolist()
    total = torch.zeros(b.shape[0], a.shape[1], dtype=torch.float64)
    for r in order:
        total = total + b[:, r : r + 1] * a[r]
    assert torch.equal(total, healing.delta(1, "down"))


def test_healing_too_large_to_be_exact_is_refused(make_llama: MakeLlama):
    source = open_source(make_llama()[0])
    with pytest.raises(CheckpointError, match="out of bounds"):
        random_healing(source.config, scale=3.0).delta(1, "o")


def test_a_plan_keeps_its_healing_and_the_written_checkpoint_has_it(make_llama: MakeLlama, tmp_path: Path):
    source = open_source(make_llama()[0])
    plan = replace(random_plan(source), healing=random_healing(source.config))
    (tmp_path / "plan").write_bytes(plan.to_bytes())
    loaded = RefactorPlan.load(tmp_path / "plan")
    assert loaded.to_bytes() == plan.to_bytes()
    for name, p in (("one", plan), ("two", loaded)):
        write_checkpoint(source, p, tmp_path / name, dtype="float32")
    assert files(tmp_path / "one") == files(tmp_path / "two")
    assert plan.healing is not None
    written = load_tensors(tmp_path / "one")
    healed = HealedSource(source, plan.healing)
    shared = written["model.layers.1.mlp.shared_expert.down_proj.weight"]
    neurons = plan.layers[1].permutation[: shared.shape[1]]
    assert torch.equal(shared, healed.tensor("model.layers.1.mlp.down_proj.weight")[:, neurons])


def test_healing_of_another_shape_is_refused(make_llama: MakeLlama, tmp_path: Path):
    source = open_source(make_llama()[0])
    other = open_source(make_llama("wide", hidden_size=64)[0])
    plan = replace(random_plan(source), healing=random_healing(other.config))
    with pytest.raises(CheckpointError, match="does not fit the model"):
        write_checkpoint(source, plan, tmp_path / "moe")
