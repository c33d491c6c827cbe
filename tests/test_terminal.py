"""`foregate serve` as somebody has it in a terminal: Ctrl-C, once and again, when it serves and when it loads."""

from __future__ import annotations

import contextlib
import os
import pty
import re
import signal
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from tests.test_faults import FOREGATE, PROMPT, QUEUE, SLOW, children, directory, is_alive, wait_until

__all__ = ["directory"]

CTRL_C = b"\x03"


class Terminal:
    """A pseudo-terminal whose foreground process the command is, so that Ctrl-C is for all of its group."""

    def __init__(self, *command: str) -> None:
        self._master, slave = pty.openpty()
        self._said = b""
        self.process = subprocess.Popen(
            ["setsid", "--ctty", *command], stdin=slave, stdout=slave, stderr=slave, env={**os.environ, "TERM": "xterm"}
        )
        os.close(slave)
        self._reader = threading.Thread(target=self._read)
        self._reader.start()

    def _read(self) -> None:
        with contextlib.suppress(OSError):  # the last process that had it has ended
            while part := os.read(self._master, 4096):
                self._said += part

    @property
    def text(self) -> str:
        return self._said.decode("utf-8", "replace")

    def press(self, keys: bytes) -> None:
        os.write(self._master, keys)

    def wait_for(self, text: str) -> str:
        def is_there() -> bool:
            assert self.process.poll() is None, self.text
            return re.search(text, self.text) is not None

        wait_until(is_there, 120)
        found = re.search(text, self.text)
        assert found is not None
        return found[1]

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        self._reader.join(30)
        os.close(self._master)


@pytest.fixture
def terminal(directory: Path) -> Iterator[Terminal]:
    command = (FOREGATE, "serve", str(directory), "--port", "0", "--shutdown-timeout", "20", *QUEUE, *SLOW)
    terminal = Terminal(*command)
    try:
        yield terminal
    finally:
        terminal.close()


@pytest.fixture
def answer(terminal: Terminal) -> Iterator[Iterator[str]]:
    """The lines of a stream that has begun."""
    url = terminal.wait_for(r"ready: (http://\S+)/v1")
    body = {"prompt": PROMPT, "stream": True, "ignore_eos": True, "max_tokens": 60, "temperature": 0}
    with httpx.stream("POST", f"{url}/v1/completions", json=body, timeout=60.0, trust_env=False) as response:
        lines = (line for line in response.iter_lines() if line)
        next(lines)
        yield lines


def engine_of(terminal: Terminal) -> int:
    wait_until(lambda: children(terminal.process.pid))
    return int(children(terminal.process.pid)[0])


def check_gone(terminal: Terminal, engine_pid: int, status: int) -> None:
    assert terminal.process.wait(timeout=22) == status
    wait_until(lambda: not is_alive(engine_pid), 5)
    assert "Traceback" not in terminal.text
    assert "Error" not in terminal.text


def test_ctrl_c_lets_what_runs_end_and_leaves_nothing(terminal: Terminal, answer: Iterator[str]):
    engine_pid = engine_of(terminal)
    terminal.press(CTRL_C)
    *_, finish, done = answer
    assert '"finish_reason":"length"' in finish
    assert done == "data: [DONE]"
    check_gone(terminal, engine_pid, 0)
    assert "shutting down" in terminal.text


def test_a_second_ctrl_c_waits_for_nothing(terminal: Terminal, answer: Iterator[str]):
    engine_pid = engine_of(terminal)
    os.kill(engine_pid, signal.SIGSTOP)  # what runs would never end
    terminal.press(CTRL_C)
    wait_until(lambda: "shutting down" in terminal.text)
    terminal.press(CTRL_C)
    check_gone(terminal, engine_pid, 128 + signal.SIGINT)


def test_ctrl_c_while_the_model_loads_ends_it_at_once(terminal: Terminal):
    engine_pid = engine_of(terminal)
    terminal.press(CTRL_C)
    check_gone(terminal, engine_pid, 128 + signal.SIGINT)
    assert "ready: " not in terminal.text
