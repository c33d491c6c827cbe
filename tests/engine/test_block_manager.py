from __future__ import annotations

import random

import pytest

from engine.block_manager import BlockManager
from engine.detokenizer import Detokenizer
from engine.request import Request
from engine.sampling_params import SamplingParams


def make_request(token_ids: list[int], name: str = "r") -> Request:
    params = SamplingParams()
    return Request(name, list(token_ids), len(token_ids), params, 10_000, 0, Detokenizer(None, []))  # type: ignore[arg-type]


def compute(blocks: BlockManager, request: Request) -> int:
    """Run a request's prompt; returns how many tokens were reused."""
    reused = blocks.reuse_prefix(request)
    assert blocks.allocate(request, request.num_tokens)
    request.num_computed_tokens = request.num_tokens
    blocks.commit(request)
    return reused


def test_blocks_are_taken_as_tokens_need_them_and_all_come_back():
    blocks, request = BlockManager(4, 4), make_request(list(range(10)))
    assert blocks.allocate(request, 5)
    assert len(request.block_ids) == 2
    assert blocks.allocate(request, 8)
    assert len(request.block_ids) == 2
    assert blocks.allocate(request, 9)
    assert blocks.num_used == 3
    blocks.check_integrity([request])
    blocks.free(request)
    blocks.check_integrity()
    assert blocks.num_free == 4


def test_when_blocks_run_out_nothing_is_taken():
    blocks, request = BlockManager(2, 4), make_request(list(range(10)))
    assert not blocks.allocate(request, 10)
    assert request.block_ids == []
    blocks.check_integrity()


def test_a_shared_prefix_is_reused_while_it_lives_and_after():
    blocks = BlockManager(16, 4)
    first, second = make_request([1, 2, 3, 4, 5, 6, 7, 8, 9]), make_request([1, 2, 3, 4, 5, 6, 7, 8, 10])
    assert compute(blocks, first) == 0
    assert compute(blocks, second) == 8
    assert second.block_ids[:2] == first.block_ids[:2]
    assert second.block_ids[2] != first.block_ids[2]
    blocks.check_integrity([first, second])
    blocks.free(first)
    blocks.free(second)
    third = make_request([1, 2, 3, 4, 5, 9, 9, 9, 9])
    assert compute(blocks, third) == 4
    blocks.check_integrity([third])


def test_the_same_tokens_after_another_prefix_are_not_the_same_block():
    blocks = BlockManager(16, 4)
    compute(blocks, make_request([1, 1, 1, 1, 2, 2, 2, 2, 0]))
    other = make_request([3, 3, 3, 3, 2, 2, 2, 2, 0])
    assert compute(blocks, other) == 0


def test_the_last_token_is_always_computed():
    blocks = BlockManager(16, 4)
    compute(blocks, make_request([1, 2, 3, 4, 5, 6, 7, 8]))
    assert compute(blocks, make_request([1, 2, 3, 4, 5, 6, 7, 8])) == 4


def test_a_block_that_is_written_anew_is_not_found_any_more():
    blocks = BlockManager(2, 4)
    first = make_request([1, 2, 3, 4, 5])
    compute(blocks, first)
    blocks.free(first)
    second = make_request([7, 7, 7, 7, 7])
    assert compute(blocks, second) == 0
    blocks.free(second)
    assert compute(blocks, make_request([1, 2, 3, 4, 5])) == 0


def test_blocks_are_only_offered_once_they_are_computed():
    blocks = BlockManager(16, 4)
    first = make_request(list(range(12)))
    blocks.allocate(first, 12)
    first.num_computed_tokens = 6
    blocks.commit(first)
    assert blocks.reuse_prefix(make_request(list(range(12)))) == 4


def test_two_managers_hash_the_same_tokens_differently():
    requests = [make_request([1, 2, 3, 4, 5]) for _ in range(2)]
    for request in requests:
        compute(BlockManager(4, 4), request)
    assert requests[0].block_hashes != requests[1].block_hashes


@pytest.mark.parametrize("seed", range(5))
def test_the_books_add_up_after_any_sequence_of_calls(seed: int):
    rng, blocks = random.Random(seed), BlockManager(24, 4)
    live: list[Request] = []
    for _ in range(300):
        if live and (rng.random() < 0.4 or len(live) > 6):
            blocks.free(live.pop(rng.randrange(len(live))))
        else:
            request = make_request([rng.randrange(2) for _ in range(rng.randint(1, 30))])
            blocks.reuse_prefix(request)
            if blocks.allocate(request, request.num_tokens):
                request.num_computed_tokens = request.num_tokens
                blocks.commit(request)
                live.append(request)
            else:
                blocks.free(request)
        blocks.check_integrity(live)
    blocks.reset_prefix_cache()
    blocks.check_integrity(live)
