"""A real Prometheus beside a real server under load: no panel of any dashboard is empty, every alert can be asked."""

from __future__ import annotations

import contextlib
import json
import re
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml

from tests.deploy.programs import program
from tests.engine.tiny_models import make_checkpoint

DEPLOY = Path(__file__).parents[2] / "deploy"
FOREGATE = str(Path(sys.executable).parent / "foregate")
SERVE = (
    "--expert-memory",
    "500KiB",
    "--host-memory",
    "400KiB",
    "--link-bandwidth",
    "64MiB/s",
    "--kv-memory",
    "4MiB",
    "--shutdown-linger",
    "0",
)
LONGEST_S = 120.0  # until a query has an answer


@dataclass(frozen=True)
class Question:
    """A query that is asked somewhere."""

    where: str
    query: str


class Monitored:
    """A server under load and the Prometheus that scrapes it."""

    def __init__(self, server_url: str, prometheus_url: str) -> None:
        self.server_url = server_url
        self._prometheus = httpx.Client(base_url=prometheus_url, trust_env=False, timeout=10.0)

    def get(self, path: str, **params: str) -> Any:
        answer = self._prometheus.get(f"/api/v1/{path}", params=params).json()
        assert answer["status"] == "success", (params, answer)
        return answer["data"]

    def numbers(self, query: str) -> list[float]:
        """The answer's values that are numbers."""
        data = self.get("query", query=query)
        series = [("", data)] if data["resultType"] == "scalar" else data["result"]
        values = [float(one["value"][1]) for one in series]
        return [value for value in values if value == value]

    def unanswered(self, questions: list[Question]) -> list[Question]:
        """Those without a number, when all have had time."""
        deadline = time.monotonic() + LONGEST_S
        while questions and time.monotonic() < deadline:
            questions = [question for question in questions if not self.numbers(question.query)]
            if questions:
                time.sleep(1.0)
        return questions

    def close(self) -> None:
        self._prometheus.close()


@pytest.fixture(scope="module")
def monitored(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Monitored]:
    scratch = tmp_path_factory.mktemp("monitored")
    make_checkpoint(scratch / "tiny", "olmoe", num_hidden_layers=6)
    with contextlib.ExitStack() as stack:
        log = scratch / "server.log"
        arguments = [FOREGATE, "serve", str(scratch / "tiny"), "--port", "0", *SERVE]
        server = stack.enter_context(running(arguments, log))
        found = until(lambda: re.search(r"ready: (http://\S+)/v1", log.read_text()), server, log)
        port = free_port()
        monitored = Monitored(found[1], f"http://127.0.0.1:{port}")
        config = prometheus_config(scratch, found[1].removeprefix("http://"))
        arguments = [program("prometheus"), f"--config.file={config}", f"--storage.tsdb.path={scratch / 'tsdb'}"]
        log = scratch / "prometheus.log"
        prometheus = stack.enter_context(running([*arguments, f"--web.listen-address=127.0.0.1:{port}"], log))
        until(lambda: "Server is ready" in log.read_text(), prometheus, log)
        stack.callback(monitored.close)
        stack.enter_context(load(found[1]))
        yield monitored


@contextlib.contextmanager
def running(arguments: list[str], log: Path) -> Iterator[subprocess.Popen[bytes]]:
    with log.open("wb") as file, subprocess.Popen(arguments, stdout=file, stderr=file) as process:
        try:
            yield process
        finally:
            process.terminate()
            try:
                process.wait(20)
            except subprocess.TimeoutExpired:
                process.kill()


def until(condition: Callable[[], Any], process: subprocess.Popen[bytes], log: Path) -> Any:
    deadline = time.monotonic() + 120
    while not (found := condition()):
        assert process.poll() is None, log.read_text()
        assert time.monotonic() < deadline, log.read_text()
        time.sleep(0.05)
    return found


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def prometheus_config(folder: Path, target: str) -> Path:
    """Ours, with another target and everything done each second."""
    config = yaml.safe_load((DEPLOY / "prometheus" / "prometheus.yml").read_text())
    config["global"] = {"scrape_interval": "1s", "evaluation_interval": "1s"}
    (job,) = config["scrape_configs"]
    job["static_configs"] = [{"targets": [target]}]
    for name in config["rule_files"]:
        rules = yaml.safe_load((DEPLOY / "prometheus" / name).read_text())
        for group in rules["groups"]:
            group.pop("interval", None)
        (folder / name).write_text(yaml.safe_dump(rules))
    path = folder / "prometheus.yml"
    path.write_text(yaml.safe_dump(config))
    return path


@contextlib.contextmanager
def load(url: str) -> Iterator[None]:
    """Four clients that chat, streaming or not; one that leaves early, and one that asks for what there is not."""
    stop = threading.Event()

    def chat(client: httpx.Client, turn: int, *, stream: bool) -> None:
        text = f"{'once more ' * 8}{turn % 3} {'ab' * (turn % 40)}"
        body = {"messages": [{"role": "user", "content": text}], "max_tokens": 48, "ignore_eos": True, "stream": stream}
        client.post("/v1/chat/completions", json=body).raise_for_status()

    def leave(client: httpx.Client, turn: int) -> None:
        body = {"prompt": "x" * 40, "max_tokens": 100, "ignore_eos": True, "stream": True}
        with client.stream("POST", "/v1/completions", json=body) as response:
            next(response.iter_bytes())

    def mistake(client: httpx.Client, turn: int) -> None:
        client.post("/v1/chat/completions", json={"messages": []})
        stop.wait(0.2)

    def again(call: Callable[[httpx.Client, int], None]) -> None:
        turn = 0
        with httpx.Client(base_url=url, trust_env=False, timeout=60.0) as client:
            while not stop.is_set():
                turn += 1
                call(client, turn)

    calls: list[Callable[[httpx.Client, int], None]] = [leave, mistake]
    calls += [lambda client, turn, i=i: chat(client, turn, stream=bool(i % 2)) for i in range(4)]  # type: ignore[misc]
    threads = [threading.Thread(target=again, args=(call,)) for call in calls]
    for thread in threads:
        thread.start()
    try:
        yield
    finally:
        stop.set()
        for thread in threads:
            thread.join()


def panels() -> list[Question]:
    """What each dashboard asks, for all models and servers."""
    questions = []
    for file in sorted((DEPLOY / "grafana" / "dashboards").glob("*.json")):
        for panel in json.loads(file.read_text())["panels"]:
            for target in panel.get("targets", ()):
                query = target["expr"].replace("$__rate_interval", "15s").replace('"$model"', '".*"')
                where = f"{file.stem}: {panel['title']} ({target['legendFormat']})"
                questions.append(Question(where, query.replace('"$instance"', '".*"')))
    return questions


def rules() -> list[Question]:
    """Every alert's and every recording rule's expression."""
    questions = []
    for name in ("rules.yml", "alerts.yml"):
        for group in yaml.safe_load((DEPLOY / "prometheus" / name).read_text())["groups"]:
            questions += [Question(rule.get("alert") or rule["record"], rule["expr"]) for rule in group["rules"]]
    return questions


def test_no_panel_is_empty_under_load(monitored: Monitored):
    questions = panels()
    assert len(questions) > 70
    assert not any("$" in question.query for question in questions)
    assert monitored.unanswered(questions) == []


def test_every_rule_is_evaluated_and_asks_for_what_there_is(monitored: Monitored):
    asked = set()
    for question in rules():
        monitored.get("query", query=question.query)
        asked |= set(re.findall(r"foregate[\w:]+", question.query))
    assert len(asked) > 15
    assert monitored.unanswered([Question(name, f"count({name})") for name in sorted(asked)]) == []
    evaluated = [rule for group in monitored.get("rules")["groups"] for rule in group["rules"]]
    assert len(evaluated) == len(rules())
    assert {rule["health"] for rule in evaluated} == {"ok"}, [rule.get("lastError") for rule in evaluated]


def test_a_server_that_serves_well_raises_no_alert(monitored: Monitored):
    firing = monitored.get("query", query='ALERTS{alertstate="firing"}')["result"]
    assert [alert["metric"] for alert in firing] == []


def test_the_parts_of_steps_add_up_to_the_steps(monitored: Monitored):
    (seconds,) = monitored.numbers("sum(foregate_step_seconds_sum)")
    (stalled,) = monitored.numbers("sum(foregate_expert_stall_seconds_total)")
    (stall_part,) = monitored.numbers('foregate_step_seconds_sum{part="stall"}')
    assert 0 < stall_part <= seconds
    assert stall_part == pytest.approx(stalled, rel=0.1)


def test_promtool_finds_no_fault_with_the_metrics(monitored: Monitored):
    """But for the colons in vLLM's names, which are vLLM's."""
    text = httpx.get(f"{monitored.server_url}/metrics", trust_env=False).content
    done = subprocess.run([program("promtool"), "check", "metrics"], input=text, capture_output=True, check=False)
    complaints = (done.stdout + done.stderr).decode().splitlines()
    assert [line for line in complaints if not line.startswith("vllm:")] == []
