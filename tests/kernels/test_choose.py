"""Tokens as the reference chooses them, for every parameter and kind of logits, whatever else is in the call."""

from __future__ import annotations

import itertools
import random
from dataclasses import replace

import pytest
import torch

from kernels.backend import Choose, Draw
from kernels.torch_backend import choose as reference
from tests.kernels.backends import NATIVE, make_backend

VOCAB = 5003  # no multiple of anything
FILTERS = [
    {},
    {"top_k": 1},
    {"top_k": 40},
    {"top_k": VOCAB - 1},
    {"top_k": VOCAB + 7},
    {"top_p": 0.001},
    {"top_p": 0.9},
    {"top_p": 0.999999},
    {"min_p": 0.05},
    {"min_p": 1.0},
    {"top_k": 50, "top_p": 0.8},
    {"top_k": 200, "top_p": 0.95, "min_p": 0.02},
]


def draw(uniform: float, temperature: float = 1.0, top_k: int = 0, top_p: float = 1.0, min_p: float = 0.0) -> Draw:
    return Draw(uniform, temperature, top_k, top_p, min_p)


def make_logits(spread: float, seed: int = 0, size: int = VOCAB) -> torch.Tensor:
    return torch.randn(size, generator=torch.Generator().manual_seed(seed)) * spread - 3.0


@pytest.fixture(params=NATIVE)
def choose(request: pytest.FixtureRequest) -> Choose:
    choose: Choose = make_backend(request.param).choose  # type: ignore[attr-defined]
    return choose


@pytest.mark.parametrize("spread", [0.01, 1.0, 4.0, 30.0])
@pytest.mark.parametrize("temperature", [0.0, 0.3, 1.0, 2.0])
def test_tokens_are_those_of_the_reference(choose: Choose, spread: float, temperature: float):
    rng = random.Random(1)
    draws = [draw(rng.random(), temperature, **options) for options in FILTERS for _ in range(6)]
    rows = [make_logits(spread, seed) for seed in range(len(draws))]
    chosen, expected = choose(rows, draws), reference(rows, draws)
    others = [i for i in range(len(draws)) if chosen[i] != expected[i]]
    # a number at the border of two tokens, or a token at the border of what is kept, may fall to either side
    assert len(others) <= 1, [(draws[i], chosen[i], expected[i]) for i in others]


@pytest.mark.parametrize("options", FILTERS)
def test_every_part_of_the_distribution_is_drawn_as_often_as_it_weighs(choose: Choose, options: dict[str, float]):
    logits = make_logits(2.0, size=300)
    draws = [draw((i + 0.5) / 2000, 0.8, **options) for i in range(2000)]  # type: ignore[arg-type]
    chosen, expected = choose([logits] * 2000, draws), reference([logits] * 2000, draws)
    assert chosen == sorted(chosen)  # inversion in the order of the tokens' numbers
    assert sum(a != b for a, b in zip(chosen, expected, strict=True)) <= 2


def test_equal_logits_are_kept_from_the_first_on(choose: Choose):
    flat = torch.full((1000,), 2.5)
    kept = {k: set(choose([flat] * 300, [draw(i / 300, top_k=k) for i in range(300)])) for k in (1, 2, 30)}
    assert kept == {k: set(range(k)) for k in (1, 2, 30)}
    assert set(choose([flat] * 300, [draw(i / 300, top_p=0.0495) for i in range(300)])) == set(range(50))
    assert choose([flat], [draw(0.0, 0.0)]) == [0]


@pytest.mark.parametrize("uniform", [0.0, 0.5, 1.0 - 2**-53])
@pytest.mark.parametrize("options", FILTERS)
def test_forbidden_tokens_never_come(choose: Choose, uniform: float, options: dict[str, float]):
    logits = torch.full((VOCAB,), float("-inf"))
    allowed = [3, 256, 4096, VOCAB - 1]
    logits[allowed] = torch.tensor([1.0, 1.0, 0.5, 0.9])
    (token,) = choose([logits], [draw(uniform, **options)])  # type: ignore[arg-type]
    assert token in allowed
    assert [token] == reference([logits], [draw(uniform, **options)])  # type: ignore[arg-type]


def make_mask(size: int, share: float, seed: int) -> torch.Tensor:
    bits = torch.rand(-(-size // 32), 32, generator=torch.Generator().manual_seed(seed)) < share
    words = (bits.long() << torch.arange(32)).sum(-1)
    return torch.where(words >= 2**31, words - 2**32, words).int()


@pytest.mark.parametrize("share", [0.002, 0.5, 1.0])
@pytest.mark.parametrize("options", [{"temperature": 0.0}, *FILTERS])
def test_a_mask_leaves_what_forbidding_the_others_leaves(choose: Choose, share: float, options: dict[str, float]):
    rows = [make_logits(2.0, seed) for seed in range(16)]
    masks = [make_mask(VOCAB, share, seed) for seed in range(16)]
    draws = [draw((i + 0.5) / 16, **options) for i in range(16)]  # type: ignore[arg-type]
    forbidden = [
        row.masked_fill((mask[:, None] >> torch.arange(32) & 1).flatten()[:VOCAB] == 0, float("-inf"))
        for row, mask in zip(rows, masks, strict=True)
    ]
    masked = [replace(one, allowed=mask) for one, mask in zip(draws, masks, strict=True)]
    assert choose(rows, masked) == choose(forbidden, draws)
    assert reference(rows, masked) == reference(forbidden, draws)


@pytest.mark.parametrize("temperature", [1e-30, 1e-9, 1e-3])
def test_a_temperature_near_zero_is_as_good_as_zero(choose: Choose, temperature: float):
    rows = [make_logits(1.0, seed) for seed in range(20)]
    assert choose(rows, [draw(0.7, temperature)] * 20) == [int(row.argmax()) for row in rows]


@pytest.mark.parametrize("size", [1, 15, 16, 17, 255, 256, 257, 4111])
def test_vocabularies_of_any_size(choose: Choose, size: int):
    rows = [make_logits(3.0, seed, size) for seed in range(24)]
    draws = [draw((i + 0.5) / 24, 0.9, top_k=i % 4, top_p=0.95 if i % 2 else 1.0) for i in range(24)]
    assert choose(rows, draws) == reference(rows, draws)


@pytest.mark.parametrize("num_threads", [1, 2, 3, 4])
@pytest.mark.parametrize("isa", NATIVE)
def test_a_row_is_chosen_alone_as_in_company(isa: str, num_threads: int):
    choose: Choose = make_backend(isa, num_threads).choose  # type: ignore[attr-defined]
    rng = random.Random(4)
    rows = [make_logits(2.0, seed) for seed in range(24)]
    draws = [draw(rng.random(), 0.7, **options) for options in itertools.islice(itertools.cycle(FILTERS), 24)]
    together = choose(rows, draws)
    assert together == [choose([row], [one])[0] for row, one in zip(rows, draws, strict=True)]
    assert together == choose(rows[::-1], draws[::-1])[::-1]


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_logits_that_leave_no_choice_are_an_error(choose: Choose, value: float, temperature: float):
    for one in (choose, reference):
        with pytest.raises(ValueError, match="no token can be chosen"):
            one([make_logits(1.0), torch.full((VOCAB,), value)], [draw(0.5, temperature)] * 2)


@pytest.mark.parametrize("at", [0, 17, VOCAB - 1])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_one_logit_that_is_not_a_number_spoils_its_row(choose: Choose, at: int, temperature: float):
    spoiled = make_logits(1.0)
    spoiled[at] = float("nan")
    for one in (choose, reference):
        with pytest.raises(ValueError, match="no token can be chosen"):
            one([spoiled], [draw(0.5, temperature, top_p=0.9)])


def test_rows_that_do_not_fit_are_refused(choose: Choose):
    with pytest.raises(ValueError, match="one vocabulary"):
        choose([make_logits(1.0), make_logits(1.0, size=10)], [draw(0.5)] * 2)
    with pytest.raises(ValueError, match="takes a row"):
        choose([make_logits(1.0)], [draw(0.5)] * 2)
    with pytest.raises(ValueError, match="shorter than the vocabulary"):
        choose([make_logits(1.0)], [replace(draw(0.5), allowed=make_mask(VOCAB - 32, 0.5, 0))])
