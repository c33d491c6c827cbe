"""Experts spread over processes: one process's bits, a record that one of them cannot read, and processes that go."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from cache.packed_file import read_packed_header
from cache.placement import Placement
from engine.config import CacheConfig, EngineConfig
from engine.convert import convert
from engine.errors import ConfigError
from engine.frames import FrameCodec
from kernels.quant.formats import FORMATS
from tests.engine.conftest import greedy, run_all, tokens_of
from tests.engine.test_models import random_prompt
from tests.engine.test_offload import logprobs_of

REQUESTS = {f"r{i}": (random_prompt(5 + 9 * i, seed=i), greedy(8, logprobs=0)) for i in range(3)}


def results(engine) -> dict[str, tuple[list[int], list[float]]]:
    return {name: (tokens_of(parts), logprobs_of(parts)) for name, parts in run_all(engine, REQUESTS).items()}


def test_four_processes_give_one_processs_bits(checkpoint, make_engine):
    directory, _ = checkpoint("olmoe")
    expected = results(make_engine(directory))
    record = FORMATS["float32"].layout(64, 32).nbytes
    engine = make_engine(directory, expert_parallel=4, num_threads=1, cache={"memory_nbytes": 2 * record})
    assert results(engine) == expected
    stats = engine.stats().expert_cache
    assert stats.evictions > 0
    assert stats.num_slots == 2
    one = make_engine(directory, cache={"memory_nbytes": 2 * record})
    results(one)
    assert stats.decode.queries < one.stats().expert_cache.decode.queries  # this process has computed a part


def test_two_processes_keep_to_a_placement_and_one_that_goes_ends_the_step(checkpoint, make_engine, tmp_path: Path):
    directory, _ = checkpoint("olmoe")
    expected = results(make_engine(directory))
    ranks = ((1, 0, 1, 0, 0, 1, 1, 1), (0, 0, 1, 1, 1, 1, 1, 0))
    Placement(num_ranks=2, ranks=ranks).save(tmp_path / "placement.json")
    engine = make_engine(directory, expert_parallel=2, num_threads=1, placement=tmp_path / "placement.json")
    assert results(engine) == expected
    held = {(key.layer, key.expert) for key in engine.expert_cache.resident()}
    assert held
    assert held <= {(layer, expert) for layer in (0, 1) for expert in range(8) if ranks[layer][expert] == 0}
    (follower,) = engine._group._followers
    follower.kill()
    follower.wait()
    with pytest.raises(RuntimeError):
        results(engine)
    for request in list(engine._requests):
        engine.abort_request(request)


def test_a_record_that_another_process_cannot_read_fails_who_needs_it_and_no_other(
    checkpoint, make_engine, tmp_path: Path
):
    directory = Path(shutil.copytree(checkpoint("olmoe")[0], tmp_path / "model"))
    path = convert(directory, "float32")
    header = read_packed_header(path)
    requests = {f"r{i}": (random_prompt(1, seed=i), greedy(1)) for i in range(24)}
    intact = {name: tokens_of(outputs) for name, outputs in run_all(make_engine(directory), requests).items()}
    with path.open("r+b") as file:
        file.seek(header.data_offset + 7 * header.record_nbytes + 1000)
        byte = file.read(1)[0]
        file.seek(-1, 1)
        file.write(bytes([byte ^ 4]))
    engine = make_engine(directory, expert_parallel=2, num_threads=1)
    outputs = run_all(engine, requests)
    failed = {name for name, parts in outputs.items() if parts[-1].finish_reason == "error"}
    assert 0 < len(failed) < len(requests)
    for name in failed:
        assert "layers.0.experts.7: cannot be read by the process that has it" in (outputs[name][-1].error or "")
    for name in requests.keys() - failed:
        assert tokens_of(outputs[name]) == intact[name]


def test_a_process_that_does_not_start_is_said_to_be_missing(checkpoint, make_engine, monkeypatch):
    monkeypatch.setattr(sys, "executable", "/bin/false")
    with pytest.raises(ConfigError, match="did not start"):
        make_engine(checkpoint("olmoe")[0], expert_parallel=2)


def test_a_process_whose_leader_is_gone_before_they_met_ends(checkpoint, tmp_path: Path):
    config = EngineConfig(model=checkpoint("olmoe")[0], expert_parallel=2, cache=CacheConfig(format="float32"))
    (tmp_path / "config").write_bytes(FrameCodec[EngineConfig](EngineConfig).encode(config))
    (tmp_path / "leader").write_text("1")  # another one than its parent
    command = [sys.executable, "-m", "engine.expert_rank", str(tmp_path), "1"]
    done = subprocess.run(
        command, cwd=Path(__file__).parents[2], capture_output=True, text=True, check=False, timeout=100
    )
    assert done.returncode != 0
    assert "did not start" in done.stderr


@pytest.mark.parametrize(
    ("settings", "why"),
    [
        ({"expert_parallel": 9}, "8 experts cannot be spread over 9"),
        ({"expert_parallel": 2, "device": "sim"}, "on the CPU only, for now"),
        ({"expert_parallel": 2, "placement": Path("/nowhere/placement.json")}, "placement.json is no placement"),
    ],
)
def test_what_cannot_be_spread_is_refused(checkpoint, make_engine, settings: dict, why: str):
    with pytest.raises(ConfigError, match=why):
        make_engine(checkpoint("olmoe")[0], **settings)


def test_a_placement_of_another_model_or_size_and_a_dense_model_are_refused(checkpoint, make_engine, tmp_path: Path):
    path = tmp_path / "placement.json"
    Placement(num_ranks=2, ranks=((0, 1),)).save(path)
    with pytest.raises(ConfigError, match="not of 2 layers of 8 experts"):
        make_engine(checkpoint("olmoe")[0], expert_parallel=2, placement=path)
    Placement(num_ranks=4, ranks=((0, 1, 2, 3) * 2,) * 2).save(path)
    with pytest.raises(ConfigError, match="for 4 processes, not 2"):
        make_engine(checkpoint("olmoe")[0], expert_parallel=2, placement=path)
    with pytest.raises(ConfigError, match="no experts that could be spread"):
        make_engine(checkpoint("llama-llama3-rope")[0], expert_parallel=2)
