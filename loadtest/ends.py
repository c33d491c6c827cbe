"""How a server ends, and how it comes back: `python -m loadtest.ends`, on a server that it starts itself.

Under load each time: SIGTERM, SIGTERM twice, SIGTERM while the model loads, and its engine's process killed.
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Annotated

import httpx
import msgspec
import typer

_START_S = 600.0
_POLL_S = 0.005
_FAR_S = 120.0  # what has not happened by then does not

_LIMITS = {
    "not_ready_s": 0.1,
    "second_signal_exit_s": 2.0,
    "loading_exit_s": 2.0,
    "killed_requests_ended_s": 1.0,
    "killed_ready_again_s": 10.0,
}


class EndsResult(msgspec.Struct, frozen=True, kw_only=True):
    """Seconds from the signal."""

    num_streams: int  # under way at each signal
    not_ready_s: float  # SIGTERM: until /ready says 503
    listened_s: float  # until it took no connection any more, or ended
    streams_finished: int  # of those under way
    exit_s: float
    exit_status: int
    second_signal_exit_s: float  # from the second
    loading_exit_s: float  # SIGTERM while the model loads
    killed_requests_ended_s: float  # the engine's process killed: until the last request had ended, with an error
    killed_ready_again_s: float
    problems: list[str]


class _Server:
    def __init__(self, options: Sequence[str]) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        program = "from server.cli import main; main()"
        self.process = subprocess.Popen(
            [sys.executable, "-c", program, "serve", *options, "--port", str(self.port)],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        self.url = f"http://127.0.0.1:{self.port}"
        self.client = httpx.Client(base_url=self.url, timeout=_FAR_S, trust_env=False)

    def status(self, path: str = "/ready") -> int | None:
        """None: nobody answers."""
        try:
            return self.client.get(path).status_code
        except httpx.TransportError:
            return None

    def is_listening(self) -> bool:
        try:
            socket.create_connection(("127.0.0.1", self.port), timeout=1.0).close()
        except OSError:
            return False
        return True

    def engine_pid(self) -> int:
        """The child that runs the engine: the largest."""
        pid = self.process.pid
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
        return max(map(int, children), key=lambda one: Path(f"/proc/{one}/statm").read_text().split()[1].zfill(12))

    def exit_s(self, since: float) -> float:
        self.process.wait(_FAR_S)
        return time.monotonic() - since


class _Streams:
    """Chats under way, each on a thread, and how each ended."""

    def __init__(self, server: _Server, number: int, max_tokens: int) -> None:
        self.finished: list[bool] = []
        self._begun = threading.Semaphore(0)
        body = {"prompt": [5, 6, 7, 8], "max_tokens": max_tokens, "ignore_eos": True, "stream": True}
        self._threads = [threading.Thread(target=self._read, args=(server.url, body)) for _ in range(number)]
        for thread in self._threads:
            thread.start()
        for _ in self._threads:
            self._begun.acquire()

    def _read(self, url: str, body: dict[str, object]) -> None:
        last = ""
        told = False
        with (
            contextlib.suppress(httpx.TransportError),
            httpx.Client(timeout=_FAR_S, trust_env=False) as client,
            client.stream("POST", f"{url}/v1/completions", json=body) as response,
        ):
            for line in response.iter_lines():
                if not told:
                    self._begun.release()
                    told = True
                last = line if line.startswith("data: {") else last
        self.finished.append('"finish_reason":"length"' in last)
        if not told:
            self._begun.release()

    def wait(self) -> None:
        for thread in self._threads:
            thread.join()


@contextlib.contextmanager
def _serving(options: Sequence[str], *, ready: bool = True) -> Iterator[_Server]:
    server = _Server(options)
    try:
        if ready:
            _until(lambda: server.status() == 200, _START_S)
        yield server
    finally:
        server.client.close()
        server.process.kill()
        server.process.wait()


def _until(condition: Callable[[], bool], seconds: float = _FAR_S) -> float:
    """-> when it held; raises `TimeoutError`."""
    end = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > end:
            raise TimeoutError(f"not within {seconds:g} s")
        time.sleep(_POLL_S)
    return time.monotonic()


def ends(options: Sequence[str], num_streams: int, max_tokens: int, timeout_s: float, linger_s: float) -> EndsResult:
    with _serving(options) as server:
        streams = _Streams(server, num_streams, max_tokens)
        at = _signal(server.process.pid, signal.SIGTERM)
        not_ready_s = _until(lambda: server.status() != 200) - at
        listened_s = _until(lambda: not server.is_listening()) - at
        exit_s = server.exit_s(at)
        streams.wait()
        num_finished, exit_status = sum(streams.finished), server.process.returncode
    with _serving(options) as server:
        streams = _Streams(server, num_streams, max_tokens)
        _signal(server.process.pid, signal.SIGTERM)
        time.sleep(1.0)
        second_s = server.exit_s(_signal(server.process.pid, signal.SIGTERM))
        streams.wait()
    with _serving(options, ready=False) as server:
        _until(lambda: server.status() is not None)
        loading_s = server.exit_s(_signal(server.process.pid, signal.SIGTERM))
    with _serving(options) as server:
        streams = _Streams(server, num_streams, max_tokens)
        at = _signal(server.engine_pid(), signal.SIGKILL)
        streams.wait()
        ended_s = time.monotonic() - at
        again_s = _until(lambda: server.status() == 200) - at
    result = EndsResult(
        num_streams=num_streams,
        not_ready_s=round(not_ready_s, 3),
        listened_s=round(listened_s, 2),
        streams_finished=num_finished,
        exit_s=round(exit_s, 2),
        exit_status=exit_status,
        second_signal_exit_s=round(second_s, 2),
        loading_exit_s=round(loading_s, 2),
        killed_requests_ended_s=round(ended_s, 2),
        killed_ready_again_s=round(again_s, 2),
        problems=[],
    )
    return msgspec.structs.replace(result, problems=_problems(result, timeout_s, linger_s))


def _problems(result: EndsResult, timeout_s: float, linger_s: float) -> list[str]:
    problems = {f"{name} is above {limit:g} s": getattr(result, name) > limit for name, limit in _LIMITS.items()}
    problems |= {
        f"it listened for less than {linger_s:g} s": result.listened_s < linger_s,
        f"it ended later than {timeout_s:g} + 2 s": result.exit_s > timeout_s + 2,
        "a request was not finished": result.streams_finished < result.num_streams,
        f"it ended with status {result.exit_status}": result.exit_status != 0,
    }
    return [problem for problem, is_there in problems.items() if is_there]


def _signal(pid: int, number: int) -> float:
    os.kill(pid, number)
    return time.monotonic()


def main(
    serve: Annotated[list[str] | None, typer.Argument(help="What to serve, and with which options, after --.")] = None,
    streams: Annotated[int, typer.Option(min=1, help="Under way at each signal.")] = 16,
    max_tokens: Annotated[int, typer.Option(min=1, help="Of each.")] = 150,
    shutdown_timeout: Annotated[float, typer.Option(help="Passed on to the server.")] = 30.0,
    shutdown_linger: Annotated[float, typer.Option(help="Passed on to the server.")] = 5.0,
) -> None:
    """Prints one JSON line; exit code 1 where a figure does not hold."""
    times = ["--shutdown-timeout", f"{shutdown_timeout:g}", "--shutdown-linger", f"{shutdown_linger:g}"]
    result = ends([*(serve or ["demo"]), *times], streams, max_tokens, shutdown_timeout, shutdown_linger)
    typer.echo(msgspec.json.encode(result).decode())
    raise typer.Exit(1 if result.problems else 0)


if __name__ == "__main__":
    typer.run(main)
