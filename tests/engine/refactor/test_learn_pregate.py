"""Learning a pre-gate on a tiny model: it foretells the routers' choices better than how often they choose does."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from engine.refactor import learn_pregate as learn_pregate_module
from engine.refactor.dense import Rotary, embed
from engine.refactor.distil import Text
from engine.refactor.learn_pregate import PregateSettings, learn_pregate
from engine.refactor.plan import PregatePlan, RefactorPlan
from engine.refactor.pregate import PregateModel
from engine.refactor.source import DenseSource, open_source
from engine.refactor.student import Routes, Student
from tests.engine.refactor.conftest import MakeLlama
from tests.engine.refactor.test_distil import SPLIT, sequences
from tests.engine.refactor.test_write import random_plan

SETTINGS = PregateSettings(
    hidden_size=32, intermediate_size=64, num_recorded_tokens=200 * 24, num_epochs=12, num_distil_tokens=10 * 8 * 24
)


def choices(source: DenseSource, plan: RefactorPlan, tokens: torch.Tensor) -> torch.Tensor:
    """What the layers' own routers choose, bool [B, T, L, E]."""
    student = Student(source, plan, rank=1, temperature=1.0, seed=0, compiled=False)
    routes = Routes([], [])
    with torch.no_grad():
        student.run(student.prefix(tokens), routes=routes)
    return torch.stack(routes.chosen, 2)


def recall(chosen: torch.Tensor, scores: torch.Tensor) -> float:
    found = torch.zeros_like(scores).scatter_(-1, scores.topk(SPLIT.num_active, -1).indices, 1.0)
    return float((found * chosen).sum() / chosen.sum())


@pytest.fixture
def source(make_llama: MakeLlama) -> DenseSource:
    return open_source(make_llama()[0])


def test_it_foretells_what_the_routers_choose(source: DenseSource):
    plan = random_plan(source, SPLIT)
    seen: dict[str, list[float]] = {}
    pregate = learn_pregate(
        source,
        plan,
        [Text(sequences(source, 300)), Text(sequences(source, 20, seed=1), share=0.1)],
        SETTINGS,
        compiled=False,
        progress=lambda what, done, total, loss: seen.setdefault(what, []).append(loss),
    )
    stages = ["record routing", "imitate routers", "distil pre-gate", "judge imitation", "judge distillation"]
    assert list(seen) == stages
    assert len(seen["distil pre-gate"]) == 10
    assert seen["imitate routers"][-1] < 0.9 * seen["imitate routers"][0]
    tokens = sequences(source, 20, seed=2).tokens
    chosen = choices(source, plan, tokens)
    model = PregateModel(source.config, SETTINGS.spec, SPLIT.num_experts, (1, 2))
    model.load_state_dict({name: tensor.float() for name, tensor in pregate.parameters.items()})
    with torch.no_grad():
        logits = model(embed(source, tokens), Rotary.build(source.config, 24))
    often = chosen.float().mean((0, 1)).expand_as(logits)
    assert recall(chosen, logits) > recall(chosen, often) + 0.03


def test_its_plan_is_kept_with_the_experts(source: DenseSource, tmp_path: Path):
    settings = PregateSettings(
        hidden_size=32, intermediate_size=64, num_recorded_tokens=200, num_epochs=1, num_distil_tokens=0
    )
    plan = random_plan(source, SPLIT)
    pregate = learn_pregate(source, plan, [Text(sequences(source, 8))], settings, compiled=False)
    assert isinstance(pregate, PregatePlan)
    assert sum(tensor.numel() for tensor in pregate.parameters.values()) == sum(
        p.numel() for p in PregateModel(source.config, settings.spec, SPLIT.num_experts, (1, 2)).parameters()
    )


@pytest.mark.parametrize("is_worse", [False, True])
def test_what_distillation_makes_worse_is_undone(
    source: DenseSource, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, is_worse: bool
):
    settings = replace(SETTINGS, num_recorded_tokens=500, num_epochs=1, num_distil_tokens=500)
    judged = iter([1.0, 1.1 if is_worse else 0.9])
    monkeypatch.setattr(learn_pregate_module._Learning, "_divergence", lambda self, batches: next(judged))
    state = tmp_path / "pregate.state"
    texts = [Text(sequences(source, 30))]
    learned = learn_pregate(source, random_plan(source, SPLIT), texts, settings, state=state, compiled=False)
    imitated = torch.load(state, weights_only=True)
    same = [tensor.equal(imitated[name].to(tensor.dtype)) for name, tensor in learned.parameters.items()]
    assert all(same) == is_worse


def test_what_was_learned_by_imitation_is_gone_on_from(source: DenseSource, tmp_path: Path):
    settings = replace(SETTINGS, num_recorded_tokens=500, num_epochs=1, num_distil_tokens=0)
    plan, texts, state = random_plan(source, SPLIT), [Text(sequences(source, 30))], tmp_path / "pregate.state"
    first = learn_pregate(source, plan, texts, settings, state=state, compiled=False)
    seen: list[str] = []
    again = learn_pregate(
        source, plan, texts, settings, state=state, compiled=False, progress=lambda what, *_: seen.append(what)
    )
    assert seen == []
    assert all(tensor.equal(again.parameters[name]) for name, tensor in first.parameters.items())
