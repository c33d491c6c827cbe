"""Predictors against routing whose law is known."""

from __future__ import annotations

import numpy as np
import pytest

from cache.predictors import PREDICTORS
from cache.predictors.fusion import Fusion, used_by_any
from cache.predictors.predictor import View

LAYERS, EXPERTS, ACTIVE, DISTANCE = 4, 16, 4, 3
SHAPE = (LAYERS, EXPERTS, ACTIVE)


class Workload:
    """A token's experts: half of them by its identity, half by its request; gates see them through noise."""

    def __init__(self, noise: float = 1.0, seed: int = 0) -> None:
        self.rng = np.random.default_rng(seed)
        self.noise = noise
        self.of_token = self.rng.permuted(np.tile(np.arange(EXPERTS // 2), (50, LAYERS, 1)), axis=-1)[
            ..., : ACTIVE // 2
        ]
        of_request = self.rng.permuted(np.tile(np.arange(EXPERTS // 2), (9, LAYERS, 1)), axis=-1)
        self.of_request = of_request[..., : ACTIVE // 2] + EXPERTS // 2

    def step(self, requests: list[int]) -> tuple[list[int], np.ndarray]:
        """-> token ids [T], chosen [L, T, E]."""
        tokens = self.rng.integers(0, 50, len(requests)).tolist()
        chosen = np.zeros((LAYERS, len(requests), EXPERTS), dtype=np.bool_)
        for t, (token, request) in enumerate(zip(tokens, requests, strict=True)):
            for layer in range(LAYERS):
                chosen[layer, t, self.of_token[token, layer]] = True
                chosen[layer, t, self.of_request[request % 9, layer]] = True
        return tokens, chosen

    def gates(self, chosen: np.ndarray, index: int) -> np.ndarray:
        return self.noisy(chosen[index + 1 : index + 1 + DISTANCE])

    def noisy(self, chosen: np.ndarray) -> np.ndarray:
        logits = chosen * 2.0
        return (logits + self.rng.normal(0, self.noise, logits.shape)).astype(np.float32)


def recall(names: list[str], noise: float = 1.0, steps: int = 150, requests=(0, 1, 2)) -> dict[int, float]:
    """Of the last third of the steps, by distance."""
    work = Workload(noise)
    fusion = Fusion([PREDICTORS[name](*SHAPE) for name in names], SHAPE, DISTANCE)
    counts = {d: [0, 0] for d in range(1, DISTANCE + 1)}
    for step in range(steps):
        tokens, chosen = work.step(list(requests))
        fusion.step_begins()
        path = {"path": work.noisy(chosen)} if "path" in names else {}
        start = View(-1, requests, tokens, path)
        fusion.predict(start)
        for index in range(LAYERS):
            for distance, (hits, uses) in fusion.observe(index, start, chosen[index]).items():
                if step > 2 * steps // 3:
                    counts[distance][0] += hits
                    counts[distance][1] += uses
            if index + 1 < LAYERS:
                gate = {name: work.gates(chosen, index) for name in names if name in ("stale_gate", "probe")}
                fusion.predict(View(index, requests, tokens, path | gate))
    return {d: hits / uses for d, (hits, uses) in counts.items()}


@pytest.mark.parametrize("name", PREDICTORS)
def test_a_predictor_beats_chance_and_forgets_requests(name: str):
    for found in recall([name]).values():
        assert found > 1.5 * ACTIVE / EXPERTS
    predictor = PREDICTORS[name](*SHAPE)
    view = View(-1, [5], [7])
    predictor.observe(0, view, np.ones((1, EXPERTS), dtype=np.bool_))
    predictor.ended(5)
    predictor.ended(6)
    scores = predictor.scores(slice(0, 2), view)
    assert scores is None or scores.shape == (2, 1, EXPERTS)


def test_history_knows_the_request_and_the_table_the_token():
    assert 0.45 < recall(["history"])[1] < 0.8  # its half, and chance in the other
    assert 0.45 < recall(["token"])[1] < 0.8
    assert recall(["history", "token"])[1] > 0.9


@pytest.mark.parametrize("noise", [0.5, 2.0])
def test_the_fusion_is_at_least_as_good_as_each_of_its_predictors(noise: float):
    fused = recall(sorted(PREDICTORS), noise)
    for name in PREDICTORS:
        alone = recall([name], noise)
        assert all(fused[d] >= alone[d] - 0.02 for d in fused)


def test_probabilities_come_true_as_often_as_they_say():
    work, names = Workload(noise=1.5), ["stale_gate", "history"]
    fusion = Fusion([PREDICTORS[name](*SHAPE) for name in names], SHAPE, DISTANCE)
    said, came = [], []
    for step in range(300):
        requests = [step // 40, 100 + step // 40]
        tokens, chosen = work.step(requests)
        fusion.step_begins()
        start = View(-1, requests, tokens)
        for index in range(LAYERS - 1):
            fusion.observe(index, start, chosen[index])
            p = fusion.predict(View(index, requests, tokens, {"stale_gate": work.gates(chosen, index)}))
            if step > 150:
                said.append(p[0].ravel())
                came.append(chosen[index + 1].ravel())
    p, y = np.concatenate(said), np.concatenate(came)
    for low in (0.0, 0.2, 0.4, 0.6, 0.8):
        some = (p >= low) & (p < low + 0.2)
        assert some.sum() > 50
        assert y[some].mean() == pytest.approx(p[some].mean(), abs=0.12)


def test_used_by_any_token():
    p = np.array([[[0.5, 0.0], [0.5, 0.1]]], dtype=np.float32)
    np.testing.assert_allclose(used_by_any(p), [[0.75, 0.1]], atol=1e-3)
    np.testing.assert_allclose(used_by_any(p[:, :1], scale=2.0), [[0.75, 0.0]], atol=1e-3)
