"""The small causal router: it learns what tokens and their context decide, and a request's means are its own."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from engine.learn_path import learn_path
from engine.path_router import DECAYS, RunningMeans

VOCAB, HIDDEN, LAYERS, EXPERTS, ACTIVE = 60, 32, 3, 8, 2


def means_of(seed: int = 0) -> RunningMeans:
    return RunningMeans(np.random.default_rng(seed).normal(size=(VOCAB, 4)).astype(np.float16))


def test_features_are_the_token_and_decayed_means_of_those_before():
    means = means_of()
    tokens = [3, 9, 9, 20]
    features = means([1] * 4, tokens).reshape(4, 1 + len(DECAYS), 4)
    states = means.reduced[tokens].astype(np.float32)
    np.testing.assert_array_equal(features[:, 0], states)
    for i, decay in enumerate(DECAYS, start=1):
        expected = states[0]
        for row in range(1, 4):
            expected = decay * expected + (1 - decay) * states[row]
        np.testing.assert_allclose(features[-1, i], expected, rtol=1e-5)


def test_requests_do_not_see_one_another_and_chunks_change_nothing():
    whole, parts = means_of(), means_of()
    alone = whole([1] * 6, range(6))
    first = parts([1, 2, 1, 2], [0, 50, 1, 51])
    second = parts([2, 1, 1, 1, 1], [52, 2, 3, 4, 5])
    np.testing.assert_allclose(np.concatenate([first[[0, 2]], second[1:]]), alone, rtol=1e-6)
    parts.ended(1)
    parts.ended(99)
    np.testing.assert_array_equal(parts([1], [0]), alone[:1])


@pytest.mark.parametrize("by_context", [False, True])
def test_what_a_token_or_its_context_decides_is_learned(by_context: bool):
    rng = np.random.default_rng(1)
    num_requests, length = 40, 50
    topics = rng.integers(0, 3, num_requests)
    tokens = rng.integers(0, VOCAB // 3, (num_requests, length)) + VOCAB // 3 * topics[:, None]
    of_token = np.stack(
        [rng.permuted(np.tile(np.arange(EXPERTS), (VOCAB, 1)), axis=1)[:, :ACTIVE] for _ in range(LAYERS)], 1
    )
    before = np.roll(tokens, 1, axis=1)
    before[:, 0] = tokens[:, 0]
    chosen = of_token[before if by_context else tokens].reshape(-1, LAYERS, ACTIVE)
    requests = np.repeat(np.arange(num_requests), length)
    embedding = torch.from_numpy(rng.normal(size=(VOCAB, HIDDEN)).astype(np.float32))
    is_held_out = torch.from_numpy(requests % 5 == 0)
    tensors, recall = learn_path(
        embedding, tokens.ravel().tolist(), requests.tolist(), torch.from_numpy(chosen), is_held_out, EXPERTS
    )
    assert tensors["output.weight"].shape == (LAYERS * EXPERTS, len(tensors["hidden.bias"]))
    assert recall > (0.5 if by_context else 0.95)  # chance is 0.25
