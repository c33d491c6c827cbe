"""The whole product as a user starts it: the command, the bundled model, the openai client."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import openai
import pytest

from cache.trace import load

FOREGATE = [str(Path(sys.executable).parent / "foregate")]
QUESTION = [{"role": "user", "content": "What is the capital of France?"}]


class Server:
    def __init__(self, log: Path, *options: str) -> None:
        self._log = log
        with log.open("wb") as file:
            self.process = subprocess.Popen([*FOREGATE, "serve", "demo", "--port", "0", *options], stderr=file)
        self.url = self._wait()

    def _wait(self) -> str:
        for _ in range(1200):
            found = re.search(r"ready: (http://\S+)/v1", self._log.read_text())
            if found:
                return found[1]
            if self.process.poll() is not None:
                break
            time.sleep(0.1)
        raise AssertionError(f"the server did not start:\n{self._log.read_text()}")

    def stop(self) -> int:
        self.process.send_signal(signal.SIGINT)
        return self.process.wait(timeout=30)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    server = Server(tmp_path_factory.mktemp("server") / "log")
    yield server
    assert server.stop() == 0


@pytest.fixture
def client(server: Server) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:
        yield client


def ask(client: openai.OpenAI, **kwargs: object) -> str:
    answer = client.chat.completions.create(model="demo", messages=QUESTION, temperature=0, max_tokens=48, **kwargs)
    return answer.choices[0].message.content or ""


def test_the_capital_of_france_is_paris_streamed_or_not(client: openai.OpenAI):
    whole = ask(client)
    chunks = list(
        client.chat.completions.create(
            model="demo",
            messages=QUESTION,
            temperature=0,
            max_tokens=48,
            stream=True,
            stream_options={"include_usage": True},
        )
    )
    streamed = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert "Paris" in whole
    assert streamed == whole
    assert chunks[-1].usage is not None
    assert chunks[-1].usage.completion_tokens > 0


def test_completions_take_text_and_token_ids_alike(client: openai.OpenAI, server: Server):
    prompt = "The sun rises in the"
    ids = httpx.post(f"{server.url}/tokenize", json={"prompt": prompt}).json()["tokens"]
    answers = [
        client.completions.create(model="demo", prompt=p, temperature=0, max_tokens=6, logprobs=2).choices[0]
        for p in (prompt, ids)
    ]
    assert answers[0].text == answers[1].text
    assert answers[0].logprobs is not None
    assert len(answers[0].logprobs.tokens or []) == 6


def test_the_bench_measures_a_running_server(server: Server):
    options = ["--concurrency", "1,3", "--prompt-tokens", "20", "--output-tokens", "4", "--json"]
    command = [*FOREGATE, "bench", "serve", "--url", server.url, *options]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    results = [json.loads(line) for line in done.stdout.splitlines()]
    assert [(r["model"], r["concurrency"], r["num_requests"]) for r in results] == [("demo", 1, 4), ("demo", 3, 9)]
    assert all(r["num_errors"] == r["num_cached_tokens"] == 0 for r in results)
    assert all(r["output_tokens_per_s"] > 0 for r in results)


@pytest.mark.timeout(900)
def test_eight_bits_cost_half_a_percent_of_perplexity_and_four_bits_five():
    def perplexity(dtype: str, experts: str) -> float:
        options = ["--dtype", dtype, "--experts", experts, "--max-windows", "48", "--json"]
        command = [*FOREGATE, "bench", "perplexity", "demo", *options]
        done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=True)
        return float(json.loads(done.stdout)["perplexity"])

    reference = perplexity("bfloat16", "bf16")
    assert perplexity("int8", "int8") <= 1.005 * reference
    assert perplexity("int4", "int4") <= 1.05 * reference


def test_half_of_the_expert_memory_gives_the_same_answer(client: openai.OpenAI, tmp_path: Path):
    resident = ask(client)
    for options in (["--expert-memory", "52MiB"], ["--expert-memory", "300KiB"]):
        offloaded = Server(tmp_path / "log", *options)
        try:
            with openai.OpenAI(base_url=f"{offloaded.url}/v1", api_key="none") as other:
                assert ask(other) == resident
            metrics = httpx.get(f"{offloaded.url}/metrics").text
            evictions = re.findall(r"^foregate_expert_evictions_total\{.*\} (\S+)$", metrics, re.MULTILINE)
            assert sum(map(float, evictions)) > 0
        finally:
            assert offloaded.stop() == 0


@pytest.mark.parametrize(
    ("options", "why"),
    [
        (["no-such-model"], "no-such-model"),
        (["demo", "--expert-memory", "4KiB"], "raise --expert-memory"),
        (["demo", "--expert-memory", "lots"], "write it like 512MiB"),
        (["demo", "--experts", "int3"], "known: float32, bf16, int8, int4"),
        (["demo", "--dtype", "float8"], "known: auto, float32, bfloat16, int8, int4"),
        (["demo", "--max-model-len", "100000000"], "max_model_len 100000000 is above"),
        (["demo", "--kv-memory", "1MiB", "--max-model-len", "4096"], "raise --kv-memory"),
        (["demo", "--cache-policy", "best"], "known: least_stale, lfu, lru, segment, slru"),
    ],
)
def test_a_start_that_cannot_work_says_why_and_the_cure_in_one_line(options: list[str], why: str):
    command = [*FOREGATE, "serve", *options, "--port", "0"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode in (1, 2)
    assert why in done.stderr
    assert "Traceback" not in done.stderr


def test_the_routing_of_a_running_server_is_recorded(server: Server, client: openai.OpenAI, tmp_path: Path):
    out = tmp_path / "trace.npz"
    options = ("--url", server.url, "--out", str(out), "--max-tokens", "60", "--domain", "capitals")
    command = [*FOREGATE, "trace", "record", *options]
    recording = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    while recording.poll() is None:
        ask(client)
    told, _ = recording.communicate()
    trace = load(out)
    assert (recording.returncode, trace.num_tokens) == (0, 60)
    assert told == f"{out}: 60 tokens of {trace.num_requests} requests, where it was full\n"
    assert set(trace.domains) == {"capitals"}
