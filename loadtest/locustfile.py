"""Streaming chat under load: `make loadtest`, or with locust's own options

    python -m locust -f loadtest/locustfile.py --headless --host http://127.0.0.1:8000 --scenario ramp --rate 4

Locust's tables, pages and CSV show the time to the first token (`ttft`), the gaps between tokens (`inter-token`), whole
answers (`answer`) and, as an entry of its own whose numbers are no milliseconds, tokens/s of each answer. Its
percentiles are rounded; those printed at the end and written to `--result` are exact, and defined as those of
`foregate bench serve` are.
"""

from __future__ import annotations

import random
import sys
import time
from pathlib import Path
from typing import Any, ClassVar

import gevent
import msgspec
from gevent.pool import Group
from locust import LoadTestShape, User, events, task
from locust.env import Environment
from locust.runners import MasterRunner, WorkerRunner

from loadtest.chat import AskFailed, Cancelled, ChatClient
from loadtest.options import add_options, body_of, expected_of, load_of, prompts_of
from loadtest.record import LoadResult, Record, table
from loadtest.scenarios import SCENARIOS, Ask, Scenario
from server.measures import Answer

events.init_command_line_parser.add_listener(add_options)


class Run:
    """One load test: what its users share. Raises `ValueError`, `OSError` and `AskFailed` for what cannot be run."""

    def __init__(self, environment: Environment) -> None:
        options = environment.parsed_options
        if isinstance(environment.runner, (MasterRunner, WorkerRunner)):
            raise ValueError("the load test runs in one process; leave out --master, --worker and --processes")
        assert options is not None
        self._events = environment.events
        self._options = options
        self._rng = random.Random(options.seed)
        self.load = load_of(options)
        self.scenario: Scenario = SCENARIOS[options.scenario](self.load, prompts_of(options), self._rng)
        self.record = Record(expected_of(options))
        self.client = ChatClient(environment.host or "", api_key=options.api_key or None)
        self._body = body_of(options, options.model or self.client.first_model())
        self._warm_up()

    def ask(self, ask: Ask, due_at: float) -> None:
        """Send one request, wait for its end, and keep what became of it."""
        now = time.perf_counter()
        self.record.lateness_s.append(now - due_at)
        name = f" {ask.domain}" if ask.domain else ""
        last_at: float | None = None

        def on_token(at: float) -> None:
            nonlocal last_at
            if last_at is None:
                self._report(f"ttft{name}", at - due_at)
            else:
                self._report(f"inter-token{name}", at - last_at)
            last_at = at

        body = {**self._body, "messages": [{"role": "user", "content": ask.prompt}]}
        try:
            answer = self.client.ask(body, sent_at=due_at, cancel_after_s=ask.cancel_after_s, on_token=on_token)
        except Cancelled:
            self.record.cancelled(due_at, time.perf_counter())
        except AskFailed as exc:
            self._failed(ask.domain, name, exc, due_at)
        except gevent.GreenletExit:
            self._failed(ask.domain, name, AskFailed("unfinished", "had not ended after --drain"), due_at)
            raise
        else:
            self._answered(ask.domain, name, answer)

    def result(self) -> LoadResult:
        is_open = self.scenario.is_open_loop
        users = None if is_open else self.load.users
        return self.record.result(self._options.scenario, rate=self.load.rate if is_open else None, users=users)

    def _warm_up(self) -> None:
        """One short request that counts for nothing; raises `AskFailed` if not even that works."""
        self.client.ask({**self._body, "max_tokens": 4, "messages": [{"role": "user", "content": "Hello"}]})

    def _answered(self, domain: str, name: str, answer: Answer) -> None:
        self.record.answered(domain, answer)
        self._report(f"answer{name}", answer.ended_at - answer.sent_at)
        decoding_s = answer.chunks_at[-1] - answer.chunks_at[0]
        if answer.num_tokens > 1 and decoding_s > 0:
            # locust has no other column for a number: it is shown as if it were milliseconds
            self._report(f"tokens/s of an answer{name}", (answer.num_tokens - 1) / decoding_s / 1000)

    def _failed(self, domain: str, name: str, exc: AskFailed, due_at: float) -> None:
        ended_at = time.perf_counter()
        is_error = self.record.failed(domain, exc.code, str(exc), due_at, ended_at)
        what = f"answer{name}" if is_error else f"refused {exc.code}{name}"
        self._report(what, ended_at - due_at, exc if is_error else None)

    def _report(self, name: str, duration_s: float, exc: Exception | None = None) -> None:
        self._events.request.fire(
            request_type="chat",
            name=name,
            response_time=duration_s * 1000,
            response_length=0,
            exception=exc,
            context={},
        )


_runs: dict[Environment, Run] = {}  # of each environment the present one; locust hands its hooks nothing else


class ClosedLoop(User):
    """Asks, reads the whole stream, asks again."""

    @task
    def chat(self) -> None:
        run = _runs[self.environment]
        run.ask(run.scenario.ask(), time.perf_counter())


class OpenLoop(User):
    """All clients of an open loop: sends each request when it is due, and waits for none of them."""

    def __init__(self, environment: Environment) -> None:
        super().__init__(environment)
        self._asking = Group()
        self._has_sent = False

    @task
    def send(self) -> None:
        if self._has_sent:  # until the shape ends the test
            gevent.sleep(0.1)
            return
        self._has_sent = True
        run = _runs[self.environment]
        started = time.perf_counter()
        for due_s in run.scenario.arrivals():
            due_at = started + due_s
            gevent.sleep(max(0.0, due_at - time.perf_counter()))
            self._asking.start(gevent.Greenlet(run.ask, run.scenario.ask(), due_at))
        gevent.sleep(max(0.0, started + run.load.duration_s - time.perf_counter()))
        self._asking.join()

    def on_stop(self) -> None:
        self._asking.kill()


class ScenarioShape(LoadTestShape):
    """How many users there are at a time, the beginning and the end."""

    use_common_options: ClassVar[bool] = False

    def tick(self) -> tuple[int, float, list[type[User]]] | None:
        assert self.runner is not None
        environment = self.runner.environment
        if environment not in _runs:
            if not _begin(environment):
                return None
            self.reset_time()
        run = _runs[environment]
        t = self.get_run_time()
        if t >= run.load.duration_s:
            return None
        if run.scenario.is_open_loop:
            return 1, 1.0, [OpenLoop]
        users = run.scenario.users_at(t)
        return users, float(users), [ClosedLoop]


def _begin(environment: Environment) -> bool:
    assert environment.parsed_options is not None
    environment.stop_timeout = environment.parsed_options.drain
    try:
        _runs[environment] = Run(environment)
    except (ValueError, OSError, AskFailed) as exc:
        sys.stderr.write(f"error: {exc}\n")
        environment.process_exit_code = 2
        return False
    return True


@events.test_stop.add_listener
def _tell(environment: Environment, **_: Any) -> None:
    run = _runs.pop(environment, None)
    if run is None:
        return
    run.client.close()
    result = run.result()
    sys.stdout.write(table(result) + "\n")
    assert environment.parsed_options is not None
    if path := environment.parsed_options.result:
        Path(path).write_bytes(msgspec.json.encode(result) + b"\n")
    environment.process_exit_code = 0 if result.is_clean else 1
