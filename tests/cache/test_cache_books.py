"""cache/cache_books.py and cache/lifetimes.py: where experts came from, why and after how long they went."""

from __future__ import annotations

import time

import msgspec
import pytest

from cache.expert_store import ExpertStore
from cache.host_tier import HostTier
from cache.stats import CacheStats
from tests.cache.conftest import KEYS, RECORD_NBYTES, OpenCache


def wait_until(condition, seconds: float = 5.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.001)


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


def test_it_counts_where_from_each_expert_came_and_why_others_went(open_cache):
    one = open_cache(3)
    a, b, c, d = KEYS[:4]
    one.use(a, b)
    one.cache.prefetch([(c, 0.9)], 1)
    wait_until(lambda: c in one.cache.resident())
    one.use(a, b)
    one.use(c)
    one.use(d)  # makes room for itself
    one.cache.prefetch([(a, 0.9)], 2)
    wait_until(lambda: a in one.cache.resident())
    stats = one.cache.stats()
    assert stats.sources == {"top": 2, "prefetch": 1, "host": 0, "disk": 3, "cpu_compute": 0}
    assert stats.evictions_for == {"demand": 1, "prefetch": 1}
    assert stats.decode.queries == sum(stats.sources.values())
    assert stats.unique_experts.counts[:3] == [2, 2, 0]
    disk = stats.links["disk"]
    assert (disk.demand_nbytes, disk.prefetch_nbytes) == (3 * RECORD_NBYTES, 2 * RECORD_NBYTES)
    assert disk.demand_s.count + disk.prefetch_s.count <= 5
    assert disk.demand_s.sum > 0


def test_it_measures_how_long_experts_stay_lie_idle_and_are_not_wanted(open_cache, monkeypatch):
    clock = Clock()
    one = open_cache(1, clock=clock)
    monkeypatch.setattr(one.cache._books.lifetimes, "is_due", lambda: True)
    a, b = KEYS[:2]
    one.use(a)
    clock.now += 4.0
    one.use(a)
    clock.now += 0.7
    one.use(b)  # a was here for 4.7 s, idle for 0.7
    clock.now += 50.0
    one.use(a)  # again after 50.7
    stats = one.cache.stats()
    assert stats.residency_s.sum == pytest.approx(4.7 + 50.0)
    assert stats.idle_s.sum == pytest.approx(0.7 + 50.0)
    assert stats.reuse_gap_s.sum == pytest.approx(4.0 + 50.7)
    assert (stats.residency_s.count, stats.idle_s.count, stats.reuse_gap_s.count) == (2, 2, 2)


def test_about_one_in_sixteen_layer_calls_is_asked_about_reuse(open_cache):
    one = open_cache(4)
    for _ in range(1600):
        one.use(KEYS[0])
    assert 60 < one.cache.stats().reuse_gap_s.count < 140


def test_snapshots_survive_the_wire(open_cache):
    one = open_cache(2)
    for key in KEYS[:5]:
        one.use(key)
    one.cache.foretold(2, 1, 3)
    stats = one.cache.stats()
    assert msgspec.msgpack.decode(msgspec.msgpack.encode(stats), type=CacheStats) == stats
    assert stats.prefetch[2].recall.counts == [0, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0]


@pytest.mark.parametrize("exclusive", [False, True])
def test_the_host_tier_is_asked_for_what_the_top_tier_has_to_wait_for(packed, exclusive: bool):
    host = HostTier(ExpertStore(packed), 12, exclusive=exclusive)
    one = OpenCache(packed, 4, host=host)
    for start in (0, 4, 8, 0, 4, 8):
        one.use(*KEYS[start : start + 4])
    stats = one.cache.stats()
    below = stats.host_decode
    assert (below.queries, below.hits) == (24, host.num_hits)
    assert below.hits >= 8
    assert (stats.sources["host"], stats.sources["disk"]) == (below.hits, 24 - below.hits)
    assert {link: of.demand_nbytes // RECORD_NBYTES for link, of in stats.links.items()} == {
        "disk": 24 - below.hits,
        "host": below.hits,
    }
    one.cache.close()
    one.cache.check_integrity()
