"""`loadtest.ends`: what does not hold is named. That servers end and come back so is in `tests/test_faults.py`."""

from __future__ import annotations

import msgspec

from loadtest.ends import EndsResult, _problems


def test_what_does_not_hold_is_named() -> None:
    good = EndsResult(
        num_streams=2,
        not_ready_s=0.01,
        listened_s=5.1,
        streams_finished=2,
        exit_s=6.0,
        exit_status=0,
        second_signal_exit_s=0.1,
        loading_exit_s=0.1,
        killed_requests_ended_s=0.1,
        killed_ready_again_s=4.0,
        problems=[],
    )
    assert _problems(good, 30.0, 5.0) == []
    bad = msgspec.structs.replace(good, listened_s=4.0, streams_finished=1, exit_s=33.0, killed_ready_again_s=11.0)
    assert _problems(bad, 30.0, 5.0) == [
        "killed_ready_again_s is above 10 s",
        "it listened for less than 5 s",
        "it ended later than 30 + 2 s",
        "a request was not finished",
    ]
