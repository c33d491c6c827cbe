"""Faults made to happen to a server as users start it: a killed engine, a bad disk, clients that go or never read."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest

from cache.packed_file import read_packed_header
from engine.convert import convert
from tests.engine.tiny_models import make_checkpoint

FOREGATE = str(Path(sys.executable).parent / "foregate")
PROMPT = list(range(40))
# the link makes a step take tens of milliseconds, so that requests can be met while they run
SLOW = ("--expert-memory", "100KiB", "--link-bandwidth", "16MiB/s", "--cache-policy", "lru", "--predictor", "off")
QUEUE = ("--max-num-seqs", "2", "--kv-memory", "16MiB", "--experts", "float32", "--seed", "7", "--threads", "1")


def wait_until(condition: Callable[[], Any], seconds: float = 60.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.02)


class Server:
    def __init__(self, directory: Path, log: Path, *options: str) -> None:
        self.log = log
        self.packed = directory / "foregate" / "experts.float32.safetensors"
        command = [FOREGATE, "serve", str(directory), "--port", "0", "--shutdown-linger", "1", *QUEUE, *options]
        self.client = httpx.Client(timeout=60.0, trust_env=False)
        with log.open("wb") as file:
            self.process = subprocess.Popen(command, stderr=file)

    def close(self) -> None:
        self.client.close()
        self.process.kill()
        self.process.wait()

    def wait(self) -> None:
        def is_ready() -> bool:
            assert self.process.poll() is None, self.log.read_text()
            return "ready: http" in self.log.read_text()

        wait_until(is_ready, 120)
        found = re.search(r"ready: (http://\S+)/v1", self.log.read_text())
        assert found is not None
        self.client.base_url = httpx.URL(found[1])

    def post(self, **body: Any) -> httpx.Response:
        return self.client.post("/v1/completions", json={"prompt": PROMPT, "temperature": 0, **body})

    def status(self, path: str) -> int:
        return self.client.get(path).status_code

    def metric(self, name: str) -> float:
        lines = self.client.get("/metrics").text.splitlines()
        return sum(float(line.rsplit(" ", 1)[1]) for line in lines if re.match(name, line))

    @property
    def engine_pid(self) -> int:
        return int(children(self.process.pid)[0])

    def is_at_rest(self) -> bool:
        held = ("foregate_num_requests_running", "foregate_num_requests_waiting", "foregate_kv_cache_blocks_used")
        return all(self.metric(rf"{name}\{{") == 0 for name in held)

    def check(self) -> None:
        """Nothing is held, and the books add up."""
        wait_until(self.is_at_rest)
        wait_until(lambda: self.client.get("/admin/integrity").json()["ok"], 5)

    @contextlib.contextmanager
    def streaming(self, **body: Any) -> Iterator[Iterator[str]]:
        """The lines of a stream that has begun."""
        asked = {"prompt": PROMPT, "stream": True, "ignore_eos": True, **body}
        with self.client.stream("POST", "/v1/completions", json=asked) as response:
            assert response.status_code == 200
            lines = (line for line in response.iter_lines() if line)
            next(lines)
            yield lines

    def raw(self, **body: Any) -> socket.socket:
        """A connection that has sent a request and reads nothing."""
        data = json.dumps({"prompt": PROMPT, "ignore_eos": True, **body}).encode()
        url = self.client.base_url
        sock = socket.create_connection((url.host, url.port or 80))
        head = ("POST /v1/completions HTTP/1.1", "Host: x", "Content-Type: application/json")
        sock.sendall("\r\n".join((*head, f"Content-Length: {len(data)}", "", "")).encode() + data)
        return sock


def children(pid: int) -> list[str]:
    return Path(f"/proc/{pid}/task/{pid}/children").read_text().split()


def is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("models") / "tiny"
    directory.mkdir()
    make_checkpoint(directory, "olmoe")
    convert(directory, "float32")
    return directory


@pytest.fixture(scope="module")
def server(directory: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    server = Server(directory, tmp_path_factory.mktemp("server") / "log", *SLOW)
    try:
        server.wait()
        yield server
    finally:
        server.close()


def test_a_killed_engine_ends_what_runs_with_an_error_and_serves_again(server: Server):
    before = server.post(max_tokens=8).json()["choices"][0]["text"]
    restarts = server.metric(r"foregate_engine_restarts_total\{")
    engine_pid = server.engine_pid
    with ThreadPoolExecutor(4) as pool, server.streaming(max_tokens=400) as lines:
        whole = [pool.submit(server.post, max_tokens=400, ignore_eos=True) for _ in range(4)]
        wait_until(lambda: server.metric(r"foregate_num_requests_waiting\{") > 0)
        os.kill(engine_pid, signal.SIGKILL)
        *_, error, done = lines
        assert json.loads(error.removeprefix("data: "))["error"]["code"] == "generation_failed"
        assert done == "data: [DONE]"
        assert [one.result().status_code for one in whole] == [500] * 4
    assert server.client.get("/health").json() == {"status": "restarting"}
    assert server.post(max_tokens=1).json()["error"]["code"] == "restarting"
    assert server.status("/live") == 200
    wait_until(lambda: server.status("/ready") == 200)
    assert server.engine_pid != engine_pid
    assert server.metric(r"foregate_engine_restarts_total\{") == restarts + 1
    assert server.post(max_tokens=8).json()["choices"][0]["text"] == before
    assert "packing experts" not in server.log.read_text()
    server.check()


def test_a_disk_that_fails_under_load_fails_requests_by_name_and_only_while_it_does(server: Server):
    before = server.post(max_tokens=8).json()["choices"][0]["text"]
    whole, header = server.packed.read_bytes(), read_packed_header(server.packed)
    pid = server.engine_pid
    with server.streaming(max_tokens=400) as lines:
        os.truncate(server.packed, header.data_offset)
        *_, error, _ = lines
        assert re.search(r"expert record layers\.\d\.experts\.\d: short read", error)
    assert server.post(max_tokens=8).status_code == 500
    with server.packed.open("r+b") as file:
        file.write(whole)
    assert server.post(max_tokens=8).json()["choices"][0]["text"] == before
    assert server.engine_pid == pid
    server.check()


def test_a_full_queue_is_503_at_once_and_the_others_are_served(server: Server):
    with ThreadPoolExecutor(14) as pool:
        answers = list(pool.map(lambda _: server.post(max_tokens=60, ignore_eos=True), range(14)))
    codes = [answer.status_code for answer in answers]
    assert (codes.count(200), codes.count(503)) == (10, 4)  # 2 run and 4 x 2 wait
    refused = next(answer for answer in answers if answer.status_code == 503)
    assert refused.json()["error"]["code"] == "overloaded"
    assert int(refused.headers["retry-after"]) >= 1
    server.check()


def test_a_client_that_never_reads_holds_up_nobody_and_leaves_nothing(server: Server):
    mute = [server.raw(max_tokens=300, stream=True, logprobs=5) for _ in range(2)]
    with contextlib.ExitStack() as opened:
        for sock in mute:
            opened.enter_context(sock)
        wait_until(lambda: server.metric(r"foregate_num_requests_running\{") == 2)
        assert server.post(max_tokens=3).status_code == 200
        wait_until(server.is_at_rest)
    server.check()


@pytest.mark.parametrize("phase", ["queue", "prefill", "decode"])
def test_a_client_that_goes_leaves_nothing_behind(server: Server, phase: str):
    gone = r'foregate_requests_total\{.*code="499"'
    before = server.metric(gone)
    with contextlib.ExitStack() as opened:
        if phase == "queue":
            for _ in range(2):
                opened.enter_context(server.streaming(max_tokens=400))
        sock = opened.enter_context(server.raw(prompt=[*range(250), *range(180)], max_tokens=60, stream=True))
        held = "waiting" if phase == "queue" else "running"
        wait_until(lambda: server.metric(rf"foregate_num_requests_{held}\{{") >= 1)
        if phase == "decode":
            assert sock.recv(1) == b"H"
        sock.close()
        wait_until(lambda: server.metric(gone) == before + 1)
        wait_until(lambda: server.metric(r"foregate_num_requests_waiting\{") == 0)
    server.check()


def test_sigterm_under_load_finishes_what_runs_and_leaves_no_process(server: Server):
    engine_pid = server.engine_pid
    with server.streaming(max_tokens=200) as lines:
        server.process.send_signal(signal.SIGTERM)
        wait_until(lambda: server.status("/ready") == 503, 5)
        assert server.status("/live") == 200
        with server.streaming(max_tokens=2) as late:  # it lingers: a load balancer may not know yet
            assert list(late)[-1] == "data: [DONE]"
        *rest, finish, done = lines
    assert json.loads(finish.removeprefix("data: "))["choices"][0]["finish_reason"] == "length"
    assert done == "data: [DONE]"
    assert len(rest) > 20
    assert server.process.wait(timeout=30) == 0
    assert not is_alive(engine_pid)


@pytest.mark.parametrize("num_signals", [1, 2])
def test_a_signal_while_it_loads_and_a_second_one_end_it_at_once(directory: Path, tmp_path: Path, num_signals: int):
    with contextlib.ExitStack() as opened:
        server = Server(directory, tmp_path / "log", *SLOW)
        opened.callback(server.close)
        wait_until(lambda: children(server.process.pid))
        engine_pid = server.engine_pid
        if num_signals == 2:
            server.wait()
            opened.enter_context(server.raw(max_tokens=400))
            wait_until(lambda: server.metric(r"foregate_num_requests_running\{") == 1)
            server.process.send_signal(signal.SIGTERM)
            wait_until(lambda: server.status("/ready") == 503, 5)
        server.process.send_signal(signal.SIGTERM)
        assert server.process.wait(timeout=10) == 128 + signal.SIGTERM
        wait_until(lambda: not is_alive(engine_pid), 5)


def test_a_server_that_is_killed_leaves_no_engine(directory: Path, tmp_path: Path):
    server = Server(Path(shutil.copytree(directory, tmp_path / "model")), tmp_path / "log", *SLOW)
    wait_until(lambda: children(server.process.pid))
    engine_pid = server.engine_pid
    server.close()
    wait_until(lambda: not is_alive(engine_pid), 30)
