"""A scripted engine that keeps its own times, behind our application on a real port, and locust as a child process."""

from __future__ import annotations

import contextlib
import json
import math
import os
import subprocess
import sys
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import pytest
import uvicorn

from engine.messages import RequestOutput
from engine.sampling_params import SamplingParams
from loadtest.record import LoadResult
from server.app import create_app
from server.measures import Answer
from server.serve import listen
from server.settings import AppSettings
from tests.server.fake_engine import FakeEngine

ROOT = Path(__file__).parents[2]


class TimedEngine(FakeEngine):
    """Knows when it gave out each token: what clients measure is held against that."""

    def __init__(self) -> None:
        super().__init__()
        self.answers: list[Answer] = []

    async def generate(
        self, request_id: str, prompt_token_ids: list[int], params: SamplingParams
    ) -> AsyncIterator[RequestOutput]:
        started, given_at = time.perf_counter(), []
        try:
            async for output in super().generate(request_id, prompt_token_ids, params):
                given_at.append(time.perf_counter())
                yield output
        finally:  # after its last output it is closed, not read to the end
            self.answers.append(Answer(started, given_at, time.perf_counter(), len(given_at)))


@pytest.fixture
def timed_engine() -> TimedEngine:
    return TimedEngine()


@pytest.fixture
def serving(timed_engine: TimedEngine) -> Iterator[Callable[..., str]]:
    """`serving(**settings)` -> the URL at which a thread serves the engine."""
    with contextlib.ExitStack() as stack:

        def start(**settings: Any) -> str:
            app = create_app(timed_engine, AppSettings(served_names=("fake",), **settings))
            listener = stack.enter_context(listen("127.0.0.1", 0))
            server = uvicorn.Server(uvicorn.Config(app, lifespan="off", log_config=None))
            thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
            thread.start()
            stack.callback(thread.join)
            stack.callback(setattr, server, "should_exit", True)
            return f"http://127.0.0.1:{listener.getsockname()[1]}"

        yield start


@dataclass
class Ran:
    code: int
    out: str
    err: str
    folder: Path

    @property
    def result(self) -> LoadResult:
        return msgspec.convert(_with_nan(json.loads((self.folder / "result.json").read_bytes())), LoadResult)


def _with_nan(value: Any) -> Any:
    """JSON's nulls of a spread as the numbers they were."""
    if not isinstance(value, dict):
        return value
    is_spread = value.keys() == {"mean", "p50", "p90", "p99"}
    return {key: math.nan if is_spread and v is None else _with_nan(v) for key, v in value.items()}


@pytest.fixture
def locust(tmp_path: Path) -> Callable[..., Ran]:
    """`locust(url, "--scenario", ...)` as `make loadtest` runs it, with short prompts and answers."""
    (tmp_path / "short.txt").write_text("hi\nhow are you?\n")

    def run(url: str, *args: str, key: str = "") -> Ran:
        fixed = ["--prompts", str(tmp_path / "short.txt"), "--output-tokens", "6", "--result", "result.json"]
        written = ["--html", "report.html", "--csv", "figures"]
        command = [sys.executable, "-m", "locust", "-f", str(ROOT / "loadtest" / "locustfile.py"), "--headless"]
        done = subprocess.run(
            [*command, "--only-summary", "--host", url, *fixed, *written, *args],
            cwd=tmp_path,
            env={**os.environ, "PYTHONPATH": str(ROOT), "FOREGATE_API_KEY": key},
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )
        return Ran(done.returncode, done.stdout, done.stderr, tmp_path)

    return run
