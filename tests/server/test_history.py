from __future__ import annotations

import asyncio
import contextlib

from engine.messages import EngineStats
from server.history import COLUMNS, History


class Clock:
    def __init__(self) -> None:
        self.now = 50.0

    def __call__(self) -> float:
        return self.now


def stats_of(clock: Clock) -> EngineStats:
    return EngineStats(state="ready", output_tokens_total=int(clock.now))


def test_whoever_looks_adds_a_row_a_second_at_most() -> None:
    clock = Clock()
    history = History(lambda: stats_of(clock), clock)
    assert [row.seq for row in history.since(0)] == [1]
    clock.now += 0.5
    assert history.since(1) == []
    clock.now += 0.6
    (row,) = history.since(1)
    values = dict(zip(["time_s", *COLUMNS], row.values, strict=True))
    assert (row.seq, values["time_s"], values["output_tokens"]) == (2, 51.1, 51)


def test_only_the_last_minutes_are_kept() -> None:
    clock = Clock()
    history = History(lambda: stats_of(clock), clock)
    for _ in range(700):
        clock.now += 1
        history.since(0)
    assert [row.seq for row in history.since(0)] == list(range(101, 701))


async def test_it_goes_on_while_nobody_looks() -> None:
    history = History(lambda: EngineStats(state="ready"), asyncio.get_running_loop().time)
    running = asyncio.ensure_future(history.run())
    for _ in range(200):
        if len(history._rows) >= 2:
            break
        await asyncio.sleep(0.05)
    running.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await running
    first, second = list(history._rows)[:2]
    assert second.values[0] - first.values[0] >= 0.99
