"""What raises while requests are served: it ends those whose doing it is, and the engine goes on if it can."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from torch import Tensor

from engine.engine import Engine
from engine.model_runner import ModelRunner
from engine.request import Request
from engine.sampler import Sampler
from engine.scheduler import FcfsScheduler
from tests.engine.conftest import greedy, run_all, tokens_of
from tests.engine.test_models import random_prompt

REQUESTS = {f"r{i}": (random_prompt(5 + i, seed=i), greedy(6)) for i in range(4)}


@pytest.fixture
def engine(checkpoint: Any, make_engine: Any) -> Engine:
    return make_engine(checkpoint("olmoe")[0])


@pytest.fixture
def expected(engine: Engine) -> dict[str, list[int]]:
    return {name: tokens_of(outputs) for name, outputs in run_all(engine, REQUESTS).items()}


def boom(*args: Any, **kwargs: Any) -> Any:
    raise RuntimeError("boom")


def raise_odd(row: Tensor) -> Tensor:
    raise ValueError("odd parameters")


@pytest.mark.parametrize("num_good", [0, 3])
@pytest.mark.parametrize(
    ("spoil", "error"),
    [(raise_odd, "odd parameters"), (lambda row: row * float("nan"), "no token can be chosen: no logit is finite")],
)
def test_a_request_that_cannot_be_sampled_fails_alone(
    engine: Engine, expected, monkeypatch, num_good: int, spoil: Callable[[Tensor], Tensor], error: str
):
    adjust = Sampler._adjust

    def adjust_oddly(self: Sampler, row: Tensor, request: Request) -> Tensor:
        is_odd = request.request_id == "r2" and request.num_output_tokens >= num_good
        return spoil(row) if is_odd else adjust(self, row, request)

    monkeypatch.setattr(Sampler, "_adjust", adjust_oddly)
    outputs = run_all(engine, REQUESTS)
    assert str(outputs["r2"][-1].error).startswith(f"ValueError: {error}")
    assert tokens_of(outputs["r2"]) == expected["r2"][:num_good]
    assert all(tokens_of(outputs[name]) == expected[name] for name in ("r0", "r1", "r3"))


def test_a_request_whose_text_cannot_be_made_fails_alone(engine: Engine, expected):
    for name, request in REQUESTS.items():
        engine.add_request(name, *request)
    engine._requests["r1"].detokenizer.push = boom  # type: ignore[method-assign]
    outputs = [output for _ in range(20) if engine.has_work for output in engine.step()]
    assert [output.error for output in outputs if output.request_id == "r1"] == ["RuntimeError: boom"]
    for name in ("r0", "r2", "r3"):
        assert tokens_of([output for output in outputs if output.request_id == name]) == expected[name]


def test_a_step_that_is_nobodys_fault_ends_its_requests_and_the_engine_goes_on(engine: Engine, expected, monkeypatch):
    with monkeypatch.context() as broken:
        broken.setattr(ModelRunner, "run", boom)
        for name, request in REQUESTS.items():
            engine.add_request(name, *request)
        outputs = engine.step()
    assert {output.request_id: output.error for output in outputs} == dict.fromkeys(REQUESTS, "RuntimeError: boom")
    assert not engine.has_work
    assert {name: tokens_of(parts) for name, parts in run_all(engine, REQUESTS).items()} == expected


def test_an_engine_that_only_fails_gives_up(engine: Engine, monkeypatch):
    with monkeypatch.context() as broken:
        broken.setattr(ModelRunner, "run", boom)
        for i in range(2):
            engine.add_request(f"r{i}", [1, 2], greedy(2))
            assert engine.step()[0].finish_reason == "error"
        engine.add_request("r3", [1, 2], greedy(2))
        with pytest.raises(RuntimeError, match="boom"):
            engine.step()


def test_an_engine_whose_books_do_not_add_up_after_a_failure_gives_up(engine: Engine, monkeypatch):
    def broken(self: FcfsScheduler) -> None:
        raise AssertionError("a block is lost")

    engine.add_request("r", [1, 2], greedy(2))
    with monkeypatch.context() as patched:
        patched.setattr(ModelRunner, "run", boom)
        patched.setattr(FcfsScheduler, "check_integrity", broken)
        with pytest.raises(AssertionError, match="a block is lost"):
            engine.step()
