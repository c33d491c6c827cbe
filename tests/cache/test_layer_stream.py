"""Whole layers streamed ahead: when, what is given up, and what is left alone."""

from __future__ import annotations

from collections.abc import Sequence

from cache.expert_key import ExpertKey
from cache.layer_stream import LayerStream

NUM_EXPERTS = 8
LAYERS = [[ExpertKey(layer, expert) for expert in range(NUM_EXPERTS)] for layer in range(3)]


class _Cache:
    """Notes what it is asked for."""

    def __init__(self, here: Sequence[ExpertKey] = ()) -> None:
        self.here = set(here)
        self.brought: list[list[ExpertKey]] = []
        self.kept: list[set[ExpertKey]] = []
        self.given_up: list[tuple[int, set[ExpertKey]]] = []

    def missing(self, keys):
        return [key for key in keys if key not in self.here]

    def prefetch(self, wanted, distance, keep=frozenset()):
        assert [benefit for _, benefit in wanted] == sorted((benefit for _, benefit in wanted), reverse=True)
        assert distance == 1
        self.brought.append([key for key, _ in wanted])
        self.kept.append(set(keep))

    def cancel_prefetches(self, layer, but=frozenset()):
        self.given_up.append((layer, set(but)))


def stream(here: Sequence[ExpertKey] = ()) -> tuple[_Cache, LayerStream]:
    cache = _Cache(here)
    return cache, LayerStream(cache, LAYERS)  # type: ignore[arg-type]


def test_where_most_experts_are_needed_the_next_layers_missing_ones_are_begun():
    cache, streamed = stream(here=LAYERS[1][:2])
    streamed.step_begins(16)
    assert not cache.brought  # nothing is known of such steps yet
    streamed.layer_begins(0, range(7))
    assert cache.brought == [LAYERS[1][2:]]
    assert cache.kept == [{*LAYERS[0], *LAYERS[1], *LAYERS[2]}]  # what the step still needs


def test_what_it_takes_the_place_of_are_layers_that_have_passed():
    cache, streamed = stream()
    streamed.step_begins(16)
    streamed.layer_begins(1, range(8))
    assert cache.kept == [{*LAYERS[1], *LAYERS[2]}]
    streamed.step_begins(16)
    assert cache.kept[1] == {*LAYERS[0], *LAYERS[1]}  # before the first, the last one is the farthest away


def test_where_few_are_needed_nothing_is():
    cache, streamed = stream()
    streamed.step_begins(2)
    streamed.layer_begins(0, [1, 4])
    streamed.layer_begins(1, range(6))  # three in four: the fourth would be read in vain, for each layer
    assert not cache.brought


def test_the_last_layer_has_none_after_it():
    cache, streamed = stream()
    streamed.step_begins(16)
    streamed.layer_begins(2, range(8))
    assert not cache.brought


def test_what_a_layer_does_not_need_is_given_up_when_it_is_routed():
    cache, streamed = stream()
    streamed.step_begins(16)
    streamed.layer_begins(1, [0, 1, 2, 3, 4, 7])
    assert cache.given_up == [(1, {LAYERS[1][expert] for expert in (0, 1, 2, 3, 4, 7)})]


def test_a_step_as_large_as_one_that_needed_most_experts_begins_with_its_first_layer():
    cache, streamed = stream()
    streamed.step_begins(16)
    streamed.layer_begins(0, range(8))
    streamed.step_begins(12)
    assert len(cache.brought) == 1
    streamed.step_begins(16)
    assert cache.brought[1] == LAYERS[0]


def test_when_such_steps_need_few_experts_after_all_it_waits_for_larger_ones():
    cache, streamed = stream()
    streamed.step_begins(16)
    streamed.layer_begins(0, range(8))
    streamed.step_begins(16)
    streamed.layer_begins(0, range(3))
    num = len(cache.brought)
    streamed.step_begins(16)
    assert len(cache.brought) == num
    streamed.step_begins(17)
    assert cache.brought[-1] == LAYERS[0]
    streamed.layer_begins(0, range(3))
    streamed.step_begins(17)
    assert len(cache.brought) == num + 1
