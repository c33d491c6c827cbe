from __future__ import annotations

import threading
from collections.abc import Iterator

import pytest

from cache.expert_key import ExpertKey
from cache.expert_store import ExpertReadError, ExpertStore
from cache.pinned_tier import PinnedTier
from tests.cache.conftest import KEYS, record_of


@pytest.fixture
def store(packed):
    opened = ExpertStore(packed)
    yield opened
    opened.close()


@pytest.fixture
def make_tier(store) -> Iterator:
    tiers: list[PinnedTier] = []

    def make(num_slots: int, **kwargs: bool) -> PinnedTier:
        import mmap

        tiers.append(PinnedTier(store, num_slots, lambda nbytes: memoryview(mmap.mmap(-1, nbytes)), **kwargs))
        return tiers[-1]

    yield make
    for tier in tiers:
        tier.check_integrity()


def fetch(tier: PinnedTier, *keys: ExpertKey, went_up: bool = False) -> None:
    for key, record in zip(keys, tier.fetch(keys), strict=True):
        assert bytes(record) == record_of(key)
        tier.let_go(key, went_up=went_up)


def test_what_was_fetched_stays_and_the_least_recently_used_is_given_up(make_tier):
    tier = make_tier(2)
    for key in (KEYS[0], KEYS[1], KEYS[0], KEYS[2]):
        fetch(tier, key)
    assert [key in tier for key in KEYS[:3]] == [True, False, True]
    assert (tier.num_hits, tier.num_used) == (1, 2)


def test_a_run_that_is_partly_here_is_read_as_far_as_it_is_missing(make_tier):
    tier = make_tier(6)
    fetch(tier, KEYS[1])
    fetch(tier, *KEYS[:4])
    assert tier.num_hits == 1


def test_a_record_that_is_held_is_not_given_up(make_tier):
    tier = make_tier(2)
    fetch(tier, KEYS[0])
    held = tier.hold(KEYS[0])
    fetch(tier, KEYS[1])
    fetch(tier, KEYS[2])
    assert KEYS[0] in tier
    assert bytes(held) == record_of(KEYS[0])
    tier.let_go(KEYS[0])
    assert tier.hold(KEYS[1]) is None


def test_who_finds_everything_held_waits_until_something_is_let_go(make_tier):
    tier = make_tier(1)
    tier.fetch([KEYS[0]])
    thread = threading.Thread(target=fetch, args=(tier, KEYS[1]))
    thread.start()
    thread.join(0.05)
    assert thread.is_alive()
    tier.let_go(KEYS[0])
    thread.join(10)
    assert KEYS[1] in tier


def test_what_cannot_be_read_is_named_and_takes_no_slot(make_tier, store, monkeypatch):
    tier = make_tier(3)
    error = ExpertReadError(KEYS[1], "corrupt")
    read = store.read_run
    monkeypatch.setattr(store, "read_run", lambda keys, buffers: [error if key == KEYS[1] else None for key in keys])
    found = tier.fetch(KEYS[:2])
    assert found[1] is error
    tier.let_go(KEYS[0])
    monkeypatch.setattr(store, "read_run", read)
    fetch(tier, KEYS[1])


def test_exclusive_tiers_hold_a_record_once(make_tier):
    tier = make_tier(2, exclusive=True)
    fetch(tier, KEYS[0], went_up=True)
    assert KEYS[0] not in tier

    def copy(to: memoryview) -> None:
        to[:] = record_of(KEYS[0])

    tier.take_back(KEYS[0], copy)
    tier.take_back(KEYS[0], None)  # it is here: nothing is copied
    fetch(tier, KEYS[0], went_up=True)
    assert (KEYS[0] in tier, tier.num_hits) == (False, 1)


def test_a_copy_that_fails_on_the_way_down_leaves_nothing(make_tier):
    tier = make_tier(1, exclusive=True)

    def copy(to: memoryview) -> None:
        raise RuntimeError("the device is gone")

    with pytest.raises(RuntimeError, match="gone"):
        tier.take_back(KEYS[0], copy)
    assert KEYS[0] not in tier
