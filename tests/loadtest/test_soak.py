"""loadtest/soak.py, loadtest/process_watch.py: what grows is seen, and what does not is not."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from loadtest.process_watch import Snapshot, slope, snapshot
from loadtest.soak import SoakResult, judged
from tests.loadtest.conftest import ROOT, TimedEngine
from tests.server.fake_engine import Script, Token

HELD = Snapshot(pids=(1, 2), rss_nbytes=500_000_000, num_fds=40, num_threads=20)
LOAD = {"num_requests": 100, "num_errors": 0, "num_cancelled": 20, "errors": {}, "output_tokens_per_s": 9.0}


@contextlib.contextmanager
def child(program: str) -> Iterator[subprocess.Popen[str]]:
    """A Python process that has printed a line."""
    with subprocess.Popen(
        [sys.executable, "-c", program], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        process.stdout.readline()
        yield process
        process.kill()


def test_memory_files_threads_and_children_of_a_process_are_counted() -> None:
    program = """
import subprocess, sys, threading
held, files, threads = [], [], []
print(flush=True)
for line in sys.stdin:
    held.append(bytearray(b"x") * 30_000_000)
    files.append(open("/dev/null"))
    threads.append(threading.Thread(target=threading.Event().wait, daemon=True))
    threads[-1].start()
    threads.append(subprocess.Popen(["sleep", "60"]))
    print(flush=True)
"""
    with child(program) as process:
        before = snapshot(process.pid)
        assert before.pids == (process.pid,)
        assert process.stdin is not None
        assert process.stdout is not None
        process.stdin.write("\n")
        process.stdin.flush()
        process.stdout.readline()
        after = snapshot(process.pid)
        assert after.rss_nbytes - before.rss_nbytes > 29_000_000
        assert after.num_threads == before.num_threads + 2  # the child's too
        assert after.num_fds > before.num_fds
        (sleeper,) = set(after.pids) - {process.pid}
        os.kill(sleeper, 9)
    with pytest.raises(ProcessLookupError, match="is gone"):
        snapshot(process.pid)


def test_slopes_are_those_of_least_squares() -> None:
    assert slope([0, 1, 2], [5, 7, 9]) == 2.0
    assert slope([0, 1, 2, 3], [1, 0, 1, 0]) == pytest.approx(-0.2)
    assert slope([4.0], [7.0]) == 0.0


def judge(
    *, after: Snapshot = HELD, growth_mb: float = 0.0, load: dict[str, Any] | None = None, error: str | None = None
) -> SoakResult:
    samples = [(t, Snapshot(HELD.pids, HELD.rss_nbytes + int(t * growth_mb * 1e6), 43 + t % 2, 21)) for t in range(10)]
    return judged(10.0, {**LOAD, **(load or {})}, HELD, after, samples, error)


def test_a_server_that_stays_as_it_is_is_well() -> None:
    result = judge(growth_mb=0.9, after=Snapshot((1, 2), 503_000_000, 42, 22))
    assert result.problems == []
    assert result.rss_slope_mb_per_min == result.rss_slope_second_half_mb_per_min == 0.9
    assert (result.fds, result.threads, result.rss_mb) == ([40, 42], [20, 22], [500.0, 503.0])


@pytest.mark.parametrize(
    ("changed", "problem"),
    [
        ({"growth_mb": 1.1}, "memory grows by 1.10 MB a minute"),
        ({"after": Snapshot((1, 2), 1, 43, 20)}, "open files: 40 before, 43 after"),
        ({"after": Snapshot((1, 2), 1, 40, 23)}, "threads: 20 before, 23 after"),
        ({"after": Snapshot((1, 3), 1, 40, 20)}, "a process was started anew"),
        ({"error": "a block is lost"}, "the books do not add up: a block is lost"),
        ({"load": {"num_errors": 1, "errors": {"500: x": 1}}}, "1 requests failed: {'500: x': 1}"),
        ({"load": {"num_requests": 0}}, "nothing was answered"),
    ],
)
def test_each_thing_that_is_wrong_is_named(changed: dict[str, Any], problem: str) -> None:
    assert judge(**changed).problems == [problem]


def test_a_soak_of_a_running_server_ends_with_a_verdict(
    serving: Callable[..., str], timed_engine: TimedEngine, tmp_path: Path
) -> None:
    timed_engine.script = Script([Token("x", delay_s=0.1)] * 6)
    (tmp_path / "short.txt").write_text("hi\n")
    url = serving()

    def run() -> tuple[int, dict[str, Any]]:
        few = ["--minutes", "0.06", "--warm-up", "1", "--every", "0.2", "--prompts", str(tmp_path / "short.txt")]
        command = [sys.executable, "-m", "loadtest.soak", "--url", url, "--pid", str(os.getpid()), *few]
        done = subprocess.run(
            [*command, "--output-tokens", "6", "--cancel-within", "0.4", "--rest", "0.5"],
            cwd=ROOT,
            env={**os.environ, "PYTHONPATH": str(ROOT)},
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )
        assert done.stdout, done.stderr
        return done.returncode, json.loads(done.stdout)

    timed_engine.integrity = "a block is lost"
    code, result = run()
    assert code == 1
    assert result["integrity_error"] == "a block is lost"
    assert result["num_requests"] > 10
    assert result["num_cancelled"] > 0
    assert result["num_samples"] > 5
