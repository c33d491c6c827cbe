"""loadtest/locustfile.py: the real locust against a server whose times are known."""

from __future__ import annotations

import asyncio
import itertools
from collections import Counter
from collections.abc import Callable

import pytest

from engine.errors import EngineOverloaded
from server.auth import hash_key
from server.bench import Workload, bench_server
from server.measures import Figures, figures
from tests.loadtest.conftest import Ran, TimedEngine
from tests.server.fake_engine import Script, Token

# far apart, so that no figure can be taken for another; a busy machine adds a little to each
WAITS_S = (0.3, 0.6, 0.9)
GAPS_S = (0.15, 0.25, 0.15, 0.45, 0.15)
NOISE_S = 0.15


def scripts() -> Callable[[list[int]], Script]:
    waits = itertools.cycle(WAITS_S)

    def script(prompt: list[int]) -> Script:
        return Script([Token("x", delay_s=next(waits)), *(Token("x", delay_s=gap_s) for gap_s in GAPS_S)])

    return script


def assert_measured(measured: Figures, engine: TimedEngine) -> None:
    """What a client says is what the engine did: the last answers of it, the first was the warm-up."""
    answers = engine.answers[-measured.num_requests :]
    truth = figures(answers, measured.wall_s, Counter())
    for seen, real in (
        (measured.ttft_s, truth.ttft_s),
        (measured.inter_token_s, truth.inter_token_s),
        (measured.latency_s, truth.latency_s),
    ):
        for name in ("mean", "p50", "p90"):
            assert getattr(seen, name) == pytest.approx(getattr(real, name), abs=NOISE_S), name
    assert measured.num_chunks == truth.num_chunks == 6 * measured.num_requests
    assert measured.output_tokens_per_s == pytest.approx(truth.output_tokens_per_s)


def test_both_load_tests_measure_what_the_engine_did(
    serving: Callable[..., str], timed_engine: TimedEngine, locust: Callable[..., Ran]
) -> None:
    timed_engine.script = scripts()
    url = serving()
    ran = locust(url, "--concurrency", "4", "--duration", "4s")
    assert ran.code == 0, ran.err
    result = ran.result
    assert_measured(result, timed_engine)
    assert result.codes == {"200": result.num_requests}
    assert (result.num_requests >= 8, result.num_errors, result.users) == (True, 0, 4)
    assert 4.0 < result.wall_s < 10.0
    assert "first token, ms" in ran.out
    for name in ("ttft", "inter-token", "answer", "tokens/s of an answer"):
        assert f",{name}," in (ran.folder / "figures_stats.csv").read_text()
    assert "inter-token" in (ran.folder / "report.html").read_text()

    async def bench() -> Figures:
        workload = Workload(prompt_tokens=8, output_tokens=6, token_ids=range(256))
        (benched,) = [r async for r in bench_server(url, workload, [(4, 12)])]
        return benched

    timed_engine.script = scripts()
    benched = asyncio.run(bench())
    assert_measured(benched, timed_engine)
    assert benched.ttft_s.p50 == pytest.approx(result.ttft_s.p50, abs=0.3 + NOISE_S)  # one step of the script
    assert benched.inter_token_s.p90 == pytest.approx(result.inter_token_s.p90, abs=NOISE_S)


def test_an_open_loop_sends_what_is_due_while_nothing_is_answered(
    serving: Callable[..., str], timed_engine: TimedEngine, locust: Callable[..., Ran]
) -> None:
    most_open = 0

    def script(prompt: list[int]) -> Script:
        nonlocal most_open
        most_open = max(most_open, timed_engine.num_open)
        return Script([Token("x", delay_s=60.0 if timed_engine.seen else 0.0)])  # the first warms up

    timed_engine.script = script
    burst = ("--scenario", "burst", "--burst-size", "5", "--burst-every", "1", "--duration", "2s", "--drain", "1")
    ran = locust(serving(), *burst)
    assert ran.code == 1
    result = ran.result
    assert result.codes == {"unfinished": 10}
    assert result.errors == {"had not ended after --drain": 10}
    assert most_open == 9
    assert timed_engine.num_open == 0


def test_clients_that_hang_up_are_no_errors_and_their_requests_end(
    serving: Callable[..., str], timed_engine: TimedEngine, locust: Callable[..., Ran]
) -> None:
    timed_engine.script = Script([Token("x", delay_s=0.05)] * 6)
    ran = locust(serving(), "--scenario", "cancel-storm", "--rate", "40", "--cancel-within", "0.2", "--duration", "2s")
    assert ran.code == 0, ran.out
    result = ran.result
    # one that hung up at once may never have come to the engine, one that hung up last may have been answered
    assert 5 < timed_engine.num_aborted <= result.num_cancelled
    assert 5 < result.num_requests <= len(timed_engine.answers) - timed_engine.num_aborted - 1
    assert timed_engine.num_open == 0


def test_refusals_are_errors_unless_they_were_expected(
    serving: Callable[..., str], timed_engine: TimedEngine, locust: Callable[..., Ran]
) -> None:
    good, full = Script([Token("x", delay_s=0.02)] * 3), Script(refusal=EngineOverloaded("the queue is full"))

    def script(prompt: list[int]) -> Script:
        return good if b"Hello" in bytes(prompt) or len(timed_engine.seen) % 3 else full  # Hello warms up

    timed_engine.script = script
    url = serving(api_key_hashes=(hash_key("secret"),))
    few = ("--concurrency", "2", "--duration", "1s")
    ran = locust(url, *few, key="secret")
    assert ran.code == 1
    assert list(ran.result.errors) == ["503: the queue is full"]
    assert ran.result.codes["503"] == ran.result.num_errors > 0
    assert "the queue is full" in ran.out
    assert "secret" not in ran.out + ran.err + (ran.folder / "report.html").read_text()

    ran = locust(url, *few, "--expect", "429,503", key="secret")
    assert ran.code == 0
    assert ran.result.num_errors == 0
    assert ran.result.refusals["503"] == ran.result.codes["503"] > 0

    ran = locust(url, *few)
    assert (ran.code, ran.out) == (2, "")
    assert "error: 401: incorrect or missing API key" in ran.err
