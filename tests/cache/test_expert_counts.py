from __future__ import annotations

import numpy as np
import pytest

from cache.expert_counts import HALF_LIFE_S, ExpertCounts
from cache.expert_key import ExpertKey
from cache.expert_table import RESIDENCY, ExpertTable
from cache.host_tier import HostTier
from cache.lease import Entry


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


A, B, C = ExpertKey(2, 0), ExpertKey(2, 1), ExpertKey(5, 1)


def table_of(packed: bytes, kind: str, table: ExpertTable) -> np.ndarray:
    return np.frombuffer(packed, kind).reshape(len(table.layers), table.num_experts)


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def counts(clock: Clock) -> ExpertCounts:
    return ExpertCounts([A, B, ExpertKey(5, 0), C], clock)


def entry_of(key: ExpertKey, hits: int = 0, *, ready: bool = True) -> Entry:
    entry = Entry(key, 0)
    entry.hits, entry.ready = hits, ready
    return entry


def recent_of(counts: ExpertCounts, *entries: Entry) -> np.ndarray:
    table = counts.table(entries, ())
    return table_of(table.recent, "<f4", table)


def test_each_expert_has_its_own_queries_and_hits(counts: ExpertCounts):
    for key in (A, B, C):
        counts.missed(key)
    counts.left(entry_of(A, hits=4))
    table = counts.table([entry_of(B, hits=2), entry_of(A, hits=1)], ())
    assert table.layers == [2, 5]
    assert table_of(table.queries, "<u8", table).tolist() == [[6, 3], [0, 1]]
    assert table_of(table.hits, "<u8", table).tolist() == [[5, 2], [0, 0]]


def test_a_recent_use_counts_half_after_the_half_life(counts: ExpertCounts, clock: Clock):
    used = entry_of(A, hits=1)
    assert recent_of(counts, used)[0, 0] == 1
    clock.now += HALF_LIFE_S
    assert recent_of(counts, used)[0, 0] == 0.5
    used.hits += 1
    counts.missed(B)
    counts.age([used])
    assert recent_of(counts, used).tolist() == [[1.5, 1.0], [0.0, 0.0]]
    clock.now += HALF_LIFE_S
    assert recent_of(counts, used).tolist() == [[0.75, 0.5], [0.0, 0.0]]


def test_when_it_is_looked_at_changes_no_recent_use(clock: Clock):
    watched, left_alone = (ExpertCounts([A, B], clock) for _ in range(2))
    used = entry_of(A)
    rng = np.random.default_rng(0)
    for _ in range(400):
        used.hits += 1
        clock.now += rng.random() * 0.1
        left_alone.age([used])
        watched.age([used])
        recent_of(watched, used)
    clock.now += 15
    assert recent_of(left_alone, used) == pytest.approx(recent_of(watched, used), rel=0.15)  # some are aged together
    assert recent_of(watched, used).sum() > 1


def test_the_fastest_tier_that_has_an_expert_is_told_and_one_on_its_way_is_not_there_yet(counts: ExpertCounts):
    table = counts.table([entry_of(A), entry_of(B, ready=False)], host=[A, C])
    names = [[RESIDENCY[i] for i in row] for row in table_of(table.residency, "u1", table)]
    assert names == [["top", "absent"], ["absent", "host"]]


def test_a_caches_table_agrees_with_its_totals_and_its_tiers(open_cache, packed):
    from cache.expert_store import ExpertStore

    store = ExpertStore(packed)
    one = open_cache(2, policy="lru", host=HostTier(store, 4))
    for expert in (0, 1, 2, 0, 0):
        one.use(ExpertKey(1, expert))
    table, stats = one.cache.table(), one.cache.stats()
    queries, hits = table_of(table.queries, "<u8", table), table_of(table.hits, "<u8", table)
    assert (queries.sum(), hits.sum()) == (stats.decode.queries, stats.decode.hits) == (5, 1)
    assert queries[1, :3].tolist() == [3, 1, 1]
    residency = table_of(table.residency, "u1", table)
    assert {ExpertKey(int(layer), int(e)) for layer, e in np.argwhere(residency == 2)} == one.cache.resident()
    assert residency[1, :4].tolist() == [2, 1, 2, 0]
    store.close()
