from __future__ import annotations

from engine.messages import RequestOutput
from server.middleware import RequestRecord
from server.request_log import RequestLog


class Clock:
    now = 10.0

    def __call__(self) -> float:
        return self.now


class Seen:
    def __init__(self) -> None:
        self.outputs: list[tuple[int, RequestOutput]] = []

    def saw(self, index: int, output: RequestOutput) -> None:
        self.outputs.append((index, output))


def output(num_output: int, *, num_new: int = 1) -> RequestOutput:
    return RequestOutput(
        request_id="r",
        text="x",
        token_ids=[1] * num_new,
        num_prompt_tokens=7,
        num_cached_tokens=0,
        num_output_tokens=num_output,
    )


def test_a_running_request_is_told_as_far_as_it_has_come_and_then_as_it_ended() -> None:
    clock, seen = Clock(), Seen()
    log = RequestLog(clock)
    record = RequestRecord("mine", clock.now, stream=True)
    logged = log.begin(record, "/v1/completions", seen)
    (line,) = log.lines()
    assert (line.running, line.output_tokens, line.ttft_s, line.tokens_per_s) == (True, 0, None, None)
    for num_output in (1, 2, 3):
        clock.now += 0.5
        logged.saw(0, output(num_output))
    (line,) = log.lines()
    assert (line.running, line.prompt_tokens, line.output_tokens) == (True, 7, 3)
    assert (line.ttft_s, line.tokens_per_s) == (0.5, 2.0)
    record.status, record.finish_reason = 200, "stop"
    log.end(logged)
    clock.now += 60
    (line,) = log.lines()
    assert (line.running, line.code, line.finish_reason, line.seconds, line.age_s) == (False, "200", "stop", 1.5, 61.5)
    assert [given.num_output_tokens for _, given in seen.outputs] == [1, 2, 3]


def test_choices_are_counted_together() -> None:
    clock = Clock()
    log = RequestLog(clock)
    logged = log.begin(RequestRecord("mine", clock.now), "/v1/completions")
    logged.saw(0, output(2, num_new=2))
    clock.now += 1
    logged.saw(1, output(4, num_new=4))
    (line,) = log.lines()
    assert (line.prompt_tokens, line.output_tokens, line.tokens_per_s) == (14, 6, 4.0)


def test_those_that_run_come_first_and_of_the_others_only_the_latest_are_kept() -> None:
    clock = Clock()
    log = RequestLog(clock, keep=3)
    running = log.begin(RequestRecord("old", 1.0), "/v1/completions")
    for number in range(5):
        log.end(log.begin(RequestRecord(f"r{number}", 2.0 + number), "/v1/completions"))
    assert [line.id for line in log.lines()] == ["old", "r4", "r3", "r2"]
    assert [line.id for line in log.lines(2)] == ["old", "r4"]
    log.end(running)
    assert [line.id for line in log.lines()] == ["r4", "r3", "old"]


def test_two_requests_of_the_same_name_are_two() -> None:
    log = RequestLog(Clock())
    first, second = (log.begin(RequestRecord("same", 1.0), "/v1/completions") for _ in range(2))
    log.end(first)
    assert [line.running for line in log.lines()] == [True, False]
    log.end(second)
