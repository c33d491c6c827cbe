"""The cache against a model of it: any order of leases, prefetches and cancellations, by one thread and by many."""

from __future__ import annotations

import os
import random
import tempfile
import threading
import time
from pathlib import Path

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from cache.lease import Lease
from cache.policies import POLICIES
from tests.cache.conftest import KEYS, OpenCache, record_of, write_records

STRESS_SECONDS = float(os.environ.get("FOREGATE_STRESS_SECONDS", "60"))

some_keys = st.lists(st.sampled_from(KEYS), min_size=1, max_size=6, unique=True)


class CacheMachine(RuleBasedStateMachine):
    """Several leases are open at once; the model knows which experts each has been handed and not given back."""

    def __init__(self) -> None:
        super().__init__()
        self.scratch = tempfile.TemporaryDirectory()
        self.leases: list[tuple[Lease, list, set]] = []  # lease, its batches, keys handed out

    @initialize(
        num_slots=st.integers(8, 20),
        policy=st.sampled_from(sorted(POLICIES)),
        host=st.sampled_from([None, False, True, "native"]),
    )
    def open(self, num_slots: int, policy: str, host: bool | str | None) -> None:
        from cache.expert_store import ExpertStore
        from cache.host_tier import HostTier

        path = write_records(Path(self.scratch.name) / "experts.safetensors")
        tier = HostTier(ExpertStore(path), 5, exclusive=host) if isinstance(host, bool) else None
        is_native = host == "native"
        self.one = OpenCache(path, num_slots, is_native=is_native, policy=policy, host=tier, num_io_threads=2)
        self.num_queries = 0

    @precondition(lambda self: len(self.leases) == 0)
    @rule(keys=some_keys)
    def acquire(self, keys: list) -> None:
        self.one.cache.observe(keys[0].layer, [0], [[key.expert for key in keys]], is_prefill=False)
        lease = self.one.cache.acquire(keys)
        self.num_queries += len(keys)
        self.leases.append((lease, list(keys), set()))

    @precondition(lambda self: len(self.leases) == 1)
    @rule(keys=some_keys)
    def acquire_another(self, keys: list) -> None:
        # at most 8 slots are pinned by two leases together only if the first has few: all fit in the smallest pool
        held = self.leases[0][1]
        if len(set(held) | set(keys)) <= 8:
            self.leases.append((self.one.cache.acquire(keys), list(keys), set()))
            self.num_queries += len(keys)

    @precondition(lambda self: self.leases)
    @rule(which=st.integers(0, 1))
    def compute(self, which: int) -> None:
        lease, wanted, handed = self.leases[which % len(self.leases)]
        for batch in lease.batches():
            for key, slot in batch:
                assert key in wanted
                assert key not in handed
                assert bytes(self.one.pool.buffer(slot)) == record_of(key)
                handed.add(key)
        assert handed == set(wanted)

    @precondition(lambda self: self.leases)
    @rule(which=st.integers(0, 1))
    def release(self, which: int) -> None:
        lease, _, _ = self.leases.pop(which % len(self.leases))
        lease.release()
        lease.release()

    @rule(keys=some_keys, distance=st.integers(1, 3), keep=some_keys)
    def prefetch(self, keys: list, distance: int, keep: list) -> None:
        before = self.one.cache.resident()
        issued = self.one.cache.prefetch([(key, 0.5) for key in keys], distance, set(keep))
        assert issued <= len(set(keys) - before)
        assert before & {*keep, *keys} <= self.one.cache.resident()

    @rule(layer=st.integers(0, 2), but=some_keys)
    def cancel(self, layer: int, but: list) -> None:
        self.one.cache.cancel_prefetches(layer, set(but))

    @rule(request=st.integers(0, 2))
    def end(self, request: int) -> None:
        self.one.cache.ended(request)

    @invariant()
    def the_books_are_right(self) -> None:
        if not hasattr(self, "one"):
            return
        self.one.cache.check_integrity(idle=False)
        stats = self.one.cache.stats()
        assert stats.decode.queries == self.num_queries
        assert stats.num_slots_used <= stats.num_slots
        if stats.waves == 0:  # else a prefetch on its way had a slot that was needed for what is computed later
            for _, _, handed in self.leases:
                assert handed <= self.one.cache.resident()  # what is leased stays

    def teardown(self) -> None:
        if hasattr(self, "one"):
            for lease, _, _ in self.leases:
                lease.release()
            self.one.cache.close()
            self.one.cache.check_integrity()
            self.one.store.close()
        self.scratch.cleanup()


TestCacheMachine = CacheMachine.TestCase
TestCacheMachine.settings = settings(max_examples=40, stateful_step_count=25, deadline=None)


@pytest.mark.parametrize(("policy", "is_native"), [("lru", True), (sorted(set(POLICIES) - {"lru"})[-1], False)])
def test_many_threads_may_do_anything_at_any_time(open_cache, policy: str, is_native: bool):
    one = open_cache(6, policy=policy, num_io_threads=3, is_native=is_native)
    end = time.monotonic() + STRESS_SECONDS / 2
    failures: list[BaseException] = []
    num_leases = [0] * 8

    def work(seed: int) -> None:
        rng = random.Random(seed)
        try:
            while time.monotonic() < end and not failures:
                keys = rng.sample(KEYS, rng.randint(1, 8))
                action = rng.random()
                if action < 0.6:
                    assert sorted(one.use(*keys)) == sorted(keys)
                    num_leases[seed] += 1
                elif action < 0.75:
                    one.cache.acquire(keys).release()  # given up while loading
                elif action < 0.9:
                    one.cache.prefetch([(key, rng.random()) for key in keys], rng.randint(1, 3), set(keys[:2]))
                else:
                    one.cache.cancel_prefetches(rng.randrange(3), set(keys))
                one.cache.check_integrity(idle=False)
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=work, args=(seed,), daemon=True) for seed in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=STRESS_SECONDS + 60)
    assert not any(thread.is_alive() for thread in threads)
    assert failures == []
    assert min(num_leases) > 10 * min(STRESS_SECONDS, 1)
