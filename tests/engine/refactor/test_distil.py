"""Distillation on a tiny model: it learns, is resumed to the same bits, and its plan computes what was trained."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from engine.errors import CheckpointError, ConfigError
from engine.refactor.corpus import Passages
from engine.refactor.distil import DistilSettings, Text, distil
from engine.refactor.healing import healed
from engine.refactor.perplexity import perplexities
from engine.refactor.plan import LayerPlan, RefactorPlan, SplitSettings
from engine.refactor.source import DenseSource, open_source
from engine.refactor.student import Routes, Student
from engine.refactor.student_math import choose
from tests.engine.refactor.conftest import MakeLlama
from tests.engine.refactor.test_write import random_plan

SPLIT = SplitSettings(num_experts=4, shared_size=32, num_active=2, dense_layers=(0,))
SETTINGS = DistilSettings(num_tokens=120 * 8 * 24, rank=8, factor_rate=3e-3, router_rate=1e-4)


def sequences(source: DenseSource, count: int, length: int = 24, seed: int = 0) -> Passages:
    """Texts with something to learn: what follows a token is one of few."""
    generator = torch.Generator().manual_seed(seed)
    size = source.config.vocab_size
    tokens = [torch.randint(0, size, (count,), generator=generator)]
    for _ in range(length - 1):
        tokens.append((tokens[-1] * 7 + torch.randint(0, 3, (count,), generator=generator)) % size)
    return Passages("chains", torch.stack(tokens, 1), torch.ones(count, length - 1, dtype=torch.bool))


@pytest.fixture
def task(make_llama: MakeLlama) -> tuple[DenseSource, RefactorPlan, list[Text]]:
    source = open_source(make_llama()[0])
    texts = [Text(sequences(source, 500)), Text(sequences(source, 3, seed=1), share=0.5)]
    return source, random_plan(source, SPLIT), texts


def test_the_split_model_comes_nearer_to_the_dense_one(task):
    source, plan, texts = task
    # routers that begin by always choosing the same: with random ones each change of a weight throws the choice about
    still = [LayerPlan(x.permutation, torch.zeros_like(x.router_weight), x.router_bias) for x in plan.layers]
    plan = replace(plan, layers=still)
    seen: list[float] = []
    learned = distil(source, plan, texts, SETTINGS, compiled=False, progress=lambda done, total, kl: seen.append(kl))
    assert len(seen) == 120
    assert all(math.isfinite(kl) for kl in seen)
    judged = sequences(source, 12, seed=2).tokens

    def distance(p: RefactorPlan) -> float:
        """Mean divergence from the dense model on text that was not learned from."""
        student = Student(healed(source, p.healing), p, rank=1, temperature=0.3, seed=0, compiled=False)
        dense = Student(source, p, rank=1, temperature=0.3, seed=0, compiled=False)
        with torch.no_grad():
            ours, _ = student.run(student.prefix(judged))
            theirs = dense.teach(dense.prefix(judged))
            return student.divergence(ours.flatten(0, 1), theirs.flatten(0, 1), torch.ones(judged.numel()))[0]

    assert seen[-1] < seen[0]
    assert distance(learned) < 0.85 * distance(plan)


def test_it_goes_on_where_it_was_stopped_to_the_same_bits(task, tmp_path: Path, monkeypatch):
    source, plan, texts = task
    settings = replace(SETTINGS, num_tokens=8 * 8 * 24)
    whole = distil(source, plan, texts, settings, compiled=False)
    monkeypatch.setattr("engine.refactor.distil._SAVED_EVERY", 3)

    class Stopped(Exception):
        pass

    def stop_at_five(done: int, total: int, divergence: float) -> None:
        if done == 5:
            raise Stopped

    with pytest.raises(Stopped):
        distil(source, plan, texts, settings, state=tmp_path / "state", compiled=False, progress=stop_at_five)
    done: list[int] = []
    again = distil(
        source, plan, texts, settings, state=tmp_path / "state", compiled=False, progress=lambda n, *_: done.append(n)
    )
    assert done == [4, 5, 6, 7, 8]  # three steps were saved
    assert again.to_bytes() == whole.to_bytes()


def test_a_state_of_another_task_or_a_damaged_one_is_refused(task, tmp_path: Path):
    source, plan, texts = task
    settings = replace(SETTINGS, num_tokens=8 * 24)
    distil(source, plan, texts, settings, state=tmp_path / "state", compiled=False)
    with pytest.raises(CheckpointError, match="is of another distillation; remove it"):
        distil(source, plan, texts[:1], settings, state=tmp_path / "state", compiled=False)
    (tmp_path / "state").write_bytes((tmp_path / "state").read_bytes()[:1000])
    with pytest.raises(CheckpointError, match=r"cannot read .* remove it to begin anew"):
        distil(source, plan, texts, settings, state=tmp_path / "state", compiled=False)


def test_sequences_of_several_lengths_are_refused(task):
    source, plan, texts = task
    with pytest.raises(ConfigError, match=r"one length, got \[20, 24\]"):
        distil(source, plan, [*texts, Text(sequences(source, 2, length=20))], SETTINGS, compiled=False)


def test_the_plan_computes_what_was_trained(task):
    source, plan, texts = task
    student = Student(source, plan, rank=2, temperature=0.3, seed=0, compiled=False)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for tensors in student.learning().values():
            for tensor in tensors:
                tensor += torch.randn(tensor.shape, generator=generator) * 0.3
    passages = texts[0].passages
    tokens = passages.tokens[:8]
    with torch.no_grad():
        states, unevenness = student.run(student.prefix(tokens))
        dense = student.teach(student.prefix(tokens))
    assert 0.9 < float(unevenness) < 4.0
    judged = Passages("x", tokens, passages.scored[:8])
    (found,) = perplexities(source, student.plan(), [judged])

    def perplexity(states: torch.Tensor) -> float:
        logits = student.logits(states[:, :-1]).flatten(0, 1)
        return math.exp(torch.nn.functional.cross_entropy(logits, tokens[:, 1:].flatten()))

    assert found.refactored == pytest.approx(perplexity(states), rel=0.02)  # bf16 against float32
    assert found.dense == pytest.approx(perplexity(dense), rel=0.02)
    (before,) = perplexities(source, plan, [judged])
    assert abs(found.refactored / before.refactored - 1) > 0.1  # the changes matter


def test_a_mask_takes_the_routers_place_and_its_gradient_is_what_an_expert_is_worth(task):
    source, plan, texts = task
    student = Student(source, plan, rank=2, temperature=0.3, seed=0, compiled=False)
    hidden = student.prefix(texts[0].passages.tokens[:2])
    with torch.no_grad():
        routes = Routes([], [])
        own, _ = student.run(hidden, routes=routes)
        given, _ = student.run(hidden, masks=[chosen.float() for chosen in routes.chosen])
    assert torch.equal(own, given)
    assert [int(chosen.sum(-1).unique()) for chosen in routes.chosen] == [2, 2]
    all_on = [torch.ones_like(chosen, dtype=torch.float32).requires_grad_() for chosen in routes.chosen]
    states, _ = student.run(hidden, masks=all_on)
    torch.testing.assert_close(states.detach(), student.teach(hidden), atol=0.15, rtol=0.05)
    states.square().sum().backward()
    assert all(mask.grad is not None and mask.grad.abs().min() >= 0 and mask.grad.any() for mask in all_on)


def test_a_choice_has_its_slope_and_no_drift_that_all_experts_share():
    logits = torch.tensor([[0.3, -1.0, 0.9, 0.25, 2.0]], requires_grad=True)
    mask, chosen, _ = choose(logits, torch.tensor(2), 0.5)
    assert torch.equal(mask.round(), torch.tensor([[0.0, 0.0, 1.0, 0.0, 1.0]]))
    assert torch.equal(mask.detach().round(), chosen)
    worth = torch.tensor([[1.0, 1.0, 1.0, 2.0, 1.0]])  # all are worth choosing, the fourth most
    (mask * worth).sum().backward()
    assert logits.grad is not None
    assert abs(float(logits.grad.sum())) < 1e-6
    assert float(logits.grad[0, 3]) == logits.grad.max()
    assert (logits.grad[0, [0, 1, 2, 4]] < 0).all()
