from __future__ import annotations

import pytest

from cache.expert_key import ExpertKey
from cache.expert_store import ExpertStore
from cache.host_tier import HostTier
from cache.slot_pool import SlotPool
from tests.cache.conftest import KEYS, RECORD_NBYTES, OpenCache, record_of


@pytest.fixture
def store(packed):
    opened = ExpertStore(packed)
    yield opened
    opened.close()


def read(tier: HostTier, *keys: ExpertKey) -> list[ExpertKey]:
    pool = SlotPool(len(keys), RECORD_NBYTES)
    buffers = [pool.buffer(i) for i in range(len(keys))]
    assert tier.read_run(keys, buffers) == [None] * len(keys)
    return [key for key, buffer in zip(keys, buffers, strict=True) if bytes(buffer) == record_of(key)]


def test_what_was_read_stays_and_is_not_read_again(store, monkeypatch):
    tier = HostTier(store, 4)
    assert read(tier, *KEYS[:3]) == KEYS[:3]
    monkeypatch.setattr(store, "read_run", None)
    assert read(tier, KEYS[1], KEYS[2]) == KEYS[1:3]
    assert (tier.num_hits, tier.num_used) == (2, 3)


def test_a_run_that_is_partly_here_is_read_as_far_as_it_is_missing(store):
    tier = HostTier(store, 8)
    read(tier, KEYS[1])
    assert read(tier, *KEYS[:4]) == KEYS[:4]
    assert tier.num_hits == 1


def test_the_least_recently_used_is_given_up(store):
    tier = HostTier(store, 2)
    for key in (KEYS[0], KEYS[1], KEYS[0], KEYS[2]):
        read(tier, key)
    assert [key in tier for key in KEYS[:3]] == [True, False, True]


def test_exclusive_tiers_hold_a_record_once(store):
    tier = HostTier(store, 2, exclusive=True)
    read(tier, KEYS[0])
    assert KEYS[0] not in tier  # it went up
    tier.demote(KEYS[0], memoryview(bytearray(record_of(KEYS[0]))))
    assert KEYS[0] in tier
    assert read(tier, KEYS[0]) == [KEYS[0]]
    assert (KEYS[0] in tier, tier.num_hits) == (False, 1)


@pytest.mark.parametrize("exclusive", [False, True])
def test_a_cache_over_a_host_tier_serves_the_right_bytes_and_reads_less(packed, exclusive: bool):
    with_host = HostTier(ExpertStore(packed), 12, exclusive=exclusive)
    one = OpenCache(packed, 12, host=with_host)
    for start in (0, 4, 8, 12, 16, 0, 4, 8, 12, 16, 8) if exclusive else (0, 4, 8, 12, 16, 8, 12, 16):
        one.use(*KEYS[start : start + 8])
    stats = one.cache.stats()
    assert stats.host_hits > 0
    assert stats.host_slots == 12
    if exclusive:  # 24 records in two tiers of 12: after the first round disk is not needed
        assert stats.fetches - stats.host_hits == 24
        assert not {key for key in KEYS if key in with_host} & one.cache.resident()
    one.cache.close()
    one.cache.check_integrity()
