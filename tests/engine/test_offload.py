"""Experts out of memory: the same bits, the budget held, a corrupt record hurting only those who need it."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path

import pytest

from cache.packed_file import PackedFileError, read_packed_header
from engine.convert import convert
from engine.errors import ConfigError
from kernels.quant.formats import FORMATS
from tests.engine.conftest import greedy, run_all, tokens_of
from tests.engine.test_models import random_prompt
from tests.engine.tiny_models import make_checkpoint

SHAPES = {"mixtral": (64, 96, 8), "olmoe": (64, 32, 16), "qwen3": (64, 32, 16)}  # hidden, inner, number of experts


def logprobs_of(outputs) -> list[float]:
    return [position.chosen.logprob for output in outputs for position in output.logprobs or []]


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("variant", SHAPES)
def test_tokens_and_logprobs_are_the_same_bits_whatever_the_expert_memory(checkpoint, make_engine, variant, name):
    directory, _ = checkpoint(variant)
    hidden, inner, num_experts = SHAPES[variant]
    record = FORMATS[name].layout(hidden, inner).nbytes
    requests = {f"r{i}": (random_prompt(5 + 9 * i, seed=i), greedy(12, logprobs=0)) for i in range(5)}
    results = []
    for num_slots in (num_experts, num_experts // 2, 1):
        engine = make_engine(directory, cache={"format": name, "memory_nbytes": num_slots * record})
        outputs = run_all(engine, requests)
        results.append({r: (tokens_of(outputs[r]), logprobs_of(outputs[r])) for r in requests})
        stats = engine.stats().expert_cache
        assert stats.num_slots == num_slots
        assert (stats.evictions > 0) == (num_slots < num_experts)
    assert all(len(logprobs) == 12 for _, logprobs in results[0].values())
    assert results[0] == results[1]
    assert results[0] == results[2]


def test_a_budget_below_one_expert_is_refused_with_the_cure(checkpoint, make_engine):
    directory, _ = checkpoint("olmoe")
    with pytest.raises(
        ConfigError, match=r"expert memory of 4\.0KiB cannot hold one float32 expert .* raise --expert-m"
    ):
        make_engine(directory, cache={"memory_nbytes": 4096})


def test_a_cache_below_one_tokens_experts_is_named_at_the_start(checkpoint, make_engine, caplog):
    directory, _ = checkpoint("olmoe")
    make_engine(directory, cache={"memory_nbytes": 4 * FORMATS["float32"].layout(64, 32).nbytes})
    assert "expert cache of 4 slots is below one token's 6 experts" in caplog.text


def test_a_truncated_packed_file_is_refused_at_the_start(checkpoint, make_engine, tmp_path: Path):
    directory = Path(shutil.copytree(checkpoint("olmoe")[0], tmp_path / "model"))
    path = convert(directory, "float32")
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(PackedFileError, match="truncated"):
        make_engine(directory)


def test_a_corrupt_record_fails_the_requests_that_need_it_and_no_other(checkpoint, make_engine, tmp_path: Path):
    directory = Path(shutil.copytree(checkpoint("olmoe")[0], tmp_path / "model"))
    path = convert(directory, "float32")
    header = read_packed_header(path)
    requests = {f"r{i}": (random_prompt(1, seed=i), greedy(1)) for i in range(24)}
    intact = {name: tokens_of(outputs) for name, outputs in run_all(make_engine(directory), requests).items()}
    with path.open("r+b") as file:
        file.seek(header.data_offset + 3 * header.record_nbytes + 1000)
        byte = file.read(1)[0]
        file.seek(-1, 1)
        file.write(bytes([byte ^ 4]))
    engine = make_engine(directory)
    outputs = run_all(engine, requests)
    failed = {name for name, parts in outputs.items() if parts[-1].finish_reason == "error"}
    assert 0 < len(failed) < len(requests)
    for name in failed:
        assert "expert record layers.0.experts.3: checksum does not match" in (outputs[name][-1].error or "")
        assert tokens_of(outputs[name]) == []
    for name in requests.keys() - failed:
        assert tokens_of(outputs[name]) == intact[name]
    assert engine.stats().expert_cache.read_retries > 0


@pytest.fixture
def offloaded(checkpoint, make_engine, tmp_path: Path):
    """An engine that reads experts from disk all the time, its packed file, and what it answers."""
    directory = Path(shutil.copytree(checkpoint("olmoe")[0], tmp_path / "model"))
    path = convert(directory, "float32")
    requests = {f"r{i}": (random_prompt(5, seed=i), greedy(4)) for i in range(3)}
    expected = {name: tokens_of(outputs) for name, outputs in run_all(make_engine(directory), requests).items()}
    engine = make_engine(directory, cache={"memory_nbytes": 4 * read_packed_header(path).record_nbytes})
    return engine, path, requests, expected


def answers(engine, requests) -> dict[str, list[int]]:
    return {name: tokens_of(outputs) for name, outputs in run_all(engine, requests).items()}


def test_a_packed_file_that_is_replaced_while_in_use_is_read_on_as_it_was(offloaded):
    engine, path, requests, expected = offloaded
    assert answers(engine, requests) == expected
    other = path.with_name("other")
    other.write_bytes(bytes(path.stat().st_size))
    other.replace(path)
    assert answers(engine, requests) == expected


def test_a_packed_file_that_is_overwritten_while_in_use_fails_requests_until_it_is_right_again(offloaded):
    engine, path, requests, expected = offloaded
    whole, header = path.read_bytes(), read_packed_header(path)
    with path.open("r+b") as file:
        file.seek(header.data_offset)
        file.write(bytes(header.file_nbytes - header.data_offset))
    outputs = run_all(engine, requests)
    assert all("checksum does not match" in (parts[-1].error or "") for parts in outputs.values())
    with path.open("r+b") as file:
        file.write(whole)
    assert answers(engine, requests) == expected


@contextmanager
def reads_come_from(other: Path, path: Path):
    """Every open descriptor of `path` is one of `other` meanwhile."""
    links = {int(fd.name): fd for fd in Path("/proc/self/fd").iterdir()}
    fds = [fd for fd, link in links.items() if link.is_symlink() and os.path.realpath(link) == str(path.resolve())]
    assert fds
    instead = os.open(other, os.O_RDONLY)
    kept = {fd: os.dup(fd) for fd in fds}
    try:
        for fd in fds:
            os.dup2(instead, fd)
        yield
    finally:
        for fd, copy in kept.items():
            os.dup2(copy, fd)
            os.close(copy)
        os.close(instead)


@pytest.mark.parametrize("is_native", [True, False])
@pytest.mark.parametrize("why", ["disk read failed (Input/output error)", "short read, 0 of"])
def test_a_disk_that_fails_fails_requests_and_only_while_it_does(
    offloaded, make_engine, monkeypatch, tmp_path: Path, why: str, is_native: bool
):
    engine, path, requests, expected = offloaded
    if not is_native:
        monkeypatch.setattr("engine.loader.is_built", lambda: False)
        engine = make_engine(engine.config.model, cache={"memory_nbytes": 4 * read_packed_header(path).record_nbytes})
    empty = tmp_path / "empty"
    empty.touch()
    # the first pages of a process are never mapped: reading them through /proc fails as a broken disk does
    with reads_come_from(Path("/proc/self/mem") if "disk" in why else empty, path):
        outputs = run_all(engine, requests)
    assert all(why in (parts[-1].error or "") for parts in outputs.values())
    assert engine.stats().expert_cache.read_errors > 0
    assert answers(engine, requests) == expected


_MEASURE = """
import json, sys
from pathlib import Path
from engine.config import CacheConfig, EngineConfig
from engine.engine import Engine
from engine.sampling_params import SamplingParams

directory, budget = Path(sys.argv[1]), int(sys.argv[2])
config = EngineConfig(model=directory, max_model_len=64, kv_memory_nbytes=2**20,
                      cache=CacheConfig(format="float32", memory_nbytes=budget))
engine = Engine(config)
for i in range(8):
    engine.add_request(str(i), list(range(i, i + 24)), SamplingParams(temperature=0.0, max_tokens=2, ignore_eos=True))
while engine.has_work:
    engine.step()
peak = next(int(line.split()[1]) * 1024 for line in open("/proc/self/status") if line.startswith("VmHWM"))
stats = engine.stats().expert_cache
print(json.dumps({"peak": peak, "capacity": stats.capacity_nbytes, "used": stats.used_nbytes}))
"""


def test_peak_memory_follows_the_budget(tmp_path: Path):
    shape = {"hidden_size": 256, "intermediate_size": 1024, "num_hidden_layers": 4, "num_experts": 24}
    make_checkpoint(tmp_path, "olmoe", **shape)
    convert(tmp_path, "float32")  # made beforehand, so that what is measured is serving
    total = 4 * 24 * FORMATS["float32"].layout(256, 1024).nbytes  # 288 MiB
    peaks = {}
    for budget in (total, total // 2, total // 96):
        command = [sys.executable, "-c", _MEASURE, str(tmp_path), str(budget)]
        done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=Path(__file__).parents[2])
        measured = json.loads(done.stdout)
        assert 0.9 * budget < measured["used"] <= measured["capacity"] <= budget
        peaks[budget] = measured["peak"]
    base = peaks[total // 96] - total // 96
    for budget, peak in peaks.items():
        assert abs(peak - base - budget) < 24 * 2**20, (peaks, base)
