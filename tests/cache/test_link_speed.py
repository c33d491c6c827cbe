from __future__ import annotations

import pytest

from cache.link_speed import SAMPLE_NBYTES, BusyRate, Rate


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def test_reads_that_end_together_do_not_make_a_link_faster_than_it_is():
    clock = Clock()
    rate, busy = Rate(clock), BusyRate()
    assert rate.average is None
    assert busy.average is None
    for _ in range(20):
        began = clock.now
        rate.begin()
        rate.begin()
        for seconds, is_idle in ((2e-3, False), (1e-6, True)):
            clock.now += seconds
            rate.add(SAMPLE_NBYTES, is_idle=is_idle)
            busy.add(SAMPLE_NBYTES, began, clock.now)
        clock.now += 1.0  # nothing is under way
    true = 2 * SAMPLE_NBYTES / 2e-3
    assert rate.average == pytest.approx(true, rel=0.25)  # the last of two weighs more
    assert busy.average == pytest.approx(true, rel=0.25)


def test_a_link_that_becomes_slower_is_noticed():
    clock = Clock()
    rate = Rate(clock)
    for speed in [4e9] * 20 + [1e9] * 20:
        rate.begin()
        clock.now += SAMPLE_NBYTES / speed
        rate.add(SAMPLE_NBYTES, is_idle=True)
    assert rate.average == pytest.approx(1e9, rel=0.05)
