"""Does a server that is used for hours stay as it is? `python -m loadtest.soak --minutes 30 --cancel-share 0.2`

Loads a server, its own or one whose pid it is told, with chats of which some are cancelled, and watches its processes:
memory must not grow, files and threads must be as many at rest afterwards as before, and its books must add up.
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any

import httpx
import msgspec
import typer

from loadtest.process_watch import Snapshot, slope, snapshot
from server.remote import authorization, server_url

_LOCUSTFILE = Path(__file__).parent / "locustfile.py"
_START_S = 600.0
_MAX_RSS_SLOPE = 1.0  # MB a minute
_SLACK = 2  # files or threads that may come and go


class SoakResult(msgspec.Struct, frozen=True, kw_only=True):
    """One soak; MB are 1e6 bytes. `problems` is empty if all is well."""

    minutes: float
    num_requests: int
    num_cancelled: int
    num_errors: int
    output_tokens_per_s: float
    rss_mb: list[float]  # at rest before and after
    rss_slope_mb_per_min: float  # under load, least squares
    rss_slope_second_half_mb_per_min: float
    num_samples: int
    fds: list[int]  # at rest before and after
    threads: list[int]
    num_processes: list[int]
    same_processes: bool  # none was started anew
    integrity_error: str | None
    problems: list[str]


class Server:
    """The server under test: its address, its pid, and what it says of itself."""

    def __init__(self, url: str, pid: int, key: str | None, *, rest_s: float = 10.0) -> None:
        """`rest_s`: how long it may take to come to rest."""
        self.url, self.pid, self._rest_s = server_url(url), pid, rest_s
        headers = authorization([key] if key else [])
        self._client = httpx.Client(base_url=self.url, headers=headers, timeout=30.0, trust_env=False)

    def wait_until_ready(self) -> None:
        """Raises `ProcessLookupError` if it ends, `TimeoutError`."""
        deadline = time.monotonic() + _START_S
        while time.monotonic() < deadline:
            snapshot(self.pid)
            with contextlib.suppress(httpx.TransportError):
                if self._client.get("/health").status_code == 200:
                    return
            time.sleep(0.5)
        raise TimeoutError(f"{self.url} did not become ready within {_START_S:g} s")

    def at_rest(self) -> tuple[str | None, Snapshot]:
        """What is wrong with its books once no request is left, and what it holds then."""
        deadline = time.monotonic() + self._rest_s
        while True:
            error = self._integrity_error()
            if error is None or time.monotonic() > deadline:
                self._client.close()  # its connection is one of the server's files
                time.sleep(1.0)
                held = snapshot(self.pid)
                self._client = httpx.Client(
                    base_url=self.url, headers=self._client.headers, timeout=30.0, trust_env=False
                )
                return error, held
            time.sleep(0.5)

    def _integrity_error(self) -> str | None:
        response = self._client.get("/admin/integrity")
        response.raise_for_status()
        answer: dict[str, Any] = response.json()
        if answer["num_requests"]:
            return f"{answer['num_requests']} requests are left"
        error: str | None = answer["error"]
        return error


def soak(
    server: Server, *, minutes: float, warm_up_s: float, every_s: float, load: Sequence[str], key: str | None
) -> SoakResult:
    """Load it for a while that does not count, then for `minutes`. Raises `RuntimeError` if the load cannot be run."""
    with _load(server.url, warm_up_s, load, key) as warming:
        warming.wait()
    _, before = server.at_rest()
    samples: list[tuple[float, Snapshot]] = []
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "result.json"
        started = time.monotonic()
        with _load(server.url, minutes * 60, [*load, "--result", str(file)], key) as loading:
            while loading.poll() is None:
                t = time.monotonic() - started
                if 0.05 * minutes * 60 < t < minutes * 60:
                    samples.append((t / 60, snapshot(server.pid)))
                time.sleep(every_s)
        if not file.exists():
            raise RuntimeError(f"the load test ended with exit status {loading.returncode} and no result")
        result = msgspec.json.decode(file.read_bytes())
    integrity_error, after = server.at_rest()
    return judged(minutes, result, before, after, samples, integrity_error)


def judged(
    minutes: float,
    load: dict[str, Any],
    before: Snapshot,
    after: Snapshot,
    samples: Sequence[tuple[float, Snapshot]],
    integrity_error: str | None,
) -> SoakResult:
    """`samples`: (minutes, what was held then) under load."""
    rss = [(t, held.rss_nbytes / 1e6) for t, held in samples]
    second = rss[len(rss) // 2 :]
    growth = slope(*zip(*rss, strict=True)) if rss else 0.0
    same = {held.pids for _, held in samples} | {before.pids, after.pids} == {before.pids}
    problems = {
        "there were too few samples to judge": len(samples) < 3,
        f"memory grows by {growth:.2f} MB a minute": growth >= _MAX_RSS_SLOPE,
        f"open files: {before.num_fds} before, {after.num_fds} after": after.num_fds > before.num_fds + _SLACK,
        f"threads: {before.num_threads} before, {after.num_threads} after": (
            after.num_threads > before.num_threads + _SLACK
        ),
        "a process was started anew": not same,
        f"{load['num_errors']} requests failed: {load['errors']}": load["num_errors"] > 0,
        "nothing was answered": load["num_requests"] == load["num_errors"],
        f"the books do not add up: {integrity_error}": integrity_error is not None,
    }
    return SoakResult(
        minutes=minutes,
        num_requests=load["num_requests"],
        num_cancelled=load["num_cancelled"],
        num_errors=load["num_errors"],
        output_tokens_per_s=load["output_tokens_per_s"],
        rss_mb=[round(before.rss_nbytes / 1e6, 1), round(after.rss_nbytes / 1e6, 1)],
        rss_slope_mb_per_min=round(growth, 3),
        rss_slope_second_half_mb_per_min=round(slope(*zip(*second, strict=True)), 3) if second else 0.0,
        num_samples=len(samples),
        fds=[before.num_fds, after.num_fds],
        threads=[before.num_threads, after.num_threads],
        num_processes=[len(before.pids), len(after.pids)],
        same_processes=same,
        integrity_error=integrity_error,
        problems=[problem for problem, is_there in problems.items() if is_there],
    )


@contextlib.contextmanager
def _load(url: str, seconds: float, options: Sequence[str], key: str | None) -> Iterator[subprocess.Popen[bytes]]:
    command = [sys.executable, "-m", "locust", "-f", str(_LOCUSTFILE), "--headless", "--only-summary"]
    process = subprocess.Popen(
        [*command, "--loglevel", "ERROR", "--host", url, "--duration", f"{seconds:g}s", *options],
        cwd=_LOCUSTFILE.parents[1],
        env={**os.environ, "FOREGATE_API_KEY": key or ""},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        yield process
    finally:
        process.terminate()
        process.wait()


@contextlib.contextmanager
def _own_server(options: Sequence[str], key: str | None, rest_s: float) -> Iterator[Server]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    program = "from server.cli import main; main()"
    process = subprocess.Popen(
        [sys.executable, "-c", program, "serve", *options, "--port", str(port)],
        env={**os.environ, "FOREGATE_API_KEY": key or ""},
        stdout=subprocess.DEVNULL,
    )
    try:
        yield Server(f"http://127.0.0.1:{port}", process.pid, key, rest_s=rest_s)
    finally:
        process.send_signal(signal.SIGINT)
        process.wait()


def main(
    serve: Annotated[list[str] | None, typer.Argument(help="What to serve, and with which options, after --.")] = None,
    minutes: Annotated[float, typer.Option(min=0.05)] = 30.0,
    cancel_share: Annotated[float, typer.Option(min=0.0, max=1.0, help="Of the requests.")] = 0.2,
    cancel_within: Annotated[float, typer.Option(min=0.0, help="Seconds after which at the latest.")] = 1.0,
    concurrency: Annotated[int, typer.Option(min=1, help="Users.")] = 4,
    output_tokens: Annotated[int, typer.Option(min=1, help="Of an answer at most.")] = 32,
    scenario: Annotated[str, typer.Option(help="Of the load test.")] = "steady",
    prompts: Annotated[Path | None, typer.Option(help="File of prompts.")] = None,
    warm_up: Annotated[float, typer.Option(min=1.0, help="Seconds of load that do not count.")] = 60.0,
    every: Annotated[float, typer.Option(min=0.1, help="Seconds between samples.")] = 2.0,
    rest: Annotated[float, typer.Option(min=0.0, help="Seconds to come to rest in.")] = 10.0,
    url: Annotated[str | None, typer.Option(help="A server that runs already; needs --pid.")] = None,
    pid: Annotated[int | None, typer.Option(help="Its process, on this machine.")] = None,
    api_key: Annotated[str | None, typer.Option(envvar="FOREGATE_API_KEY", help="What to present.")] = None,
) -> None:
    """Load a server for a while and judge whether it leaks. Prints one JSON object; exit status 1 if it does."""
    if (url is None) != (pid is None):
        raise typer.BadParameter("--url and --pid go together")
    load = ["--scenario", scenario, "--concurrency", str(concurrency), "--output-tokens", str(output_tokens)]
    load += [
        "--cancel-share",
        str(cancel_share),
        "--cancel-within",
        str(cancel_within),
        *(["--prompts", str(prompts.resolve())] if prompts else []),
    ]
    with contextlib.ExitStack() as stack:
        if url is not None and pid is not None:
            server = Server(url, pid, api_key, rest_s=rest)
        else:
            server = stack.enter_context(_own_server(serve or ["demo"], api_key, rest))
        server.wait_until_ready()
        result = soak(server, minutes=minutes, warm_up_s=warm_up, every_s=every, load=load, key=api_key)
    typer.echo(msgspec.json.encode(result).decode())
    typer.echo("well" if not result.problems else f"not well: {'; '.join(result.problems)}", err=True)
    if result.problems:
        raise typer.Exit(1)


if __name__ == "__main__":
    typer.run(main)
