"""The search for tiles with made-up timers; and the real work that it times, in the interpreter."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from engine.errors import ConfigError
from engine.tune import tune, tune_on
from kernels.gpu.attention import AttentionTile
from kernels.gpu.configs import KERNELS, VARIANTS, Tile, load_configs, search_space
from kernels.gpu.tune import Trial, Work, attention_space, choose, choose_one
from kernels.gpu.tune import tune as search
from kernels.gpu.tune_work import TuneShape, TuneWork

DEFAULTS = load_configs("", "sm_90")
SHAPE = TuneShape(64, 64, 4, 2, 4, 2, 16, decode_rows=3, prefill_rows=20, context=40)


def test_both_variants_get_the_fastest_tiles_of_those_that_share_their_bits():
    decode = {"a": Trial(1.0, "x"), "b": Trial(2.0, "y"), "c": Trial(3.0, "y")}
    prefill = {"d": Trial(9.0, "x"), "e": Trial(2.0, "y"), "f": Trial(1.0, "z")}
    assert choose([decode, prefill]) == ("b", "e")  # 2 x 2 against 1 x 9; z is in one variant alone
    prefill["d"] = Trial(3.0, "x")
    assert choose([decode, prefill]) == ("a", "d")
    assert choose([{"a": Trial(1.0, "x")}, {"b": Trial(1.0, "y")}]) is None
    assert choose([decode, {}]) is None


def test_a_tile_for_all_variants_must_run_in_all_of_them():
    assert choose_one([{"a": Trial(1.0, ""), "b": Trial(2.0, "")}, {"b": Trial(2.0, ""), "c": Trial(1.0, "")}]) == "b"
    assert choose_one([{"a": Trial(4.0, ""), "b": Trial(1.0, "")}, {"a": Trial(1.0, ""), "b": Trial(3.0, "")}]) == "b"
    assert choose_one([{"a": Trial(1.0, "")}, {}]) is None


def test_what_a_made_up_timer_prefers_is_what_is_written_and_nothing_else_changes():
    best = {("linear", "decode"): Tile(32, 128, 8, 3), ("linear", "prefill"): Tile(128, 64, 8, 4)}
    tried: list[Work] = []

    def attempt(work: Work, tile: Tile | AttentionTile) -> Trial | None:
        tried.append(work)
        if work.kernel == "expert_down":
            return None  # runs nowhere
        if isinstance(tile, AttentionTile):
            return Trial(1.0 if (tile.rows, tile.keys) == (64, 64) and tile.num_stages == 2 else 2.0, str(tile))
        return Trial(0.5 if tile == best.get((work.kernel, work.variant)) else 1.0, "same")

    told: list[tuple[str, int, int]] = []
    found = search(DEFAULTS, ["int4"], ["bf16"], attempt, lambda *progress: told.append(progress))
    for (kernel, variant), tile in best.items():
        assert found.configs.tiles[kernel, "int4", variant] == tile
        assert found.gains[Work(kernel, "int4", variant)] == 2.0
    for kernel in KERNELS[1:]:  # the default is tried first, and nothing is faster
        assert found.configs.tiles[kernel, "int4", "decode"] == DEFAULTS.tiles[kernel, "int4", "decode"]
    assert found.failed == ["expert_down, int4"]
    assert (found.configs.attention["bf16"]["rows"], found.configs.attention["bf16"]["keys"]) == (64, 64)
    assert found.configs.attention["float32"] == DEFAULTS.attention["float32"]
    untouched = {key: tile for key, tile in found.configs.tiles.items() if key[1] != "int4"}
    assert untouched == {key: tile for key, tile in DEFAULTS.tiles.items() if key[1] != "int4"}
    assert load_configs("", "sm_90").tiles == DEFAULTS.tiles  # what was passed is as it was
    assert told[-1][1] == told[-1][2] == len(tried)


def test_a_tile_with_other_bits_is_not_taken_however_fast():
    odd = next(tile for tile in search_space("linear", "bf16", "decode") if tile.num_stages == 4)

    def attempt(work: Work, tile: Tile | AttentionTile) -> Trial:
        return Trial(0.001, "other") if tile == odd and work.variant == "decode" else Trial(1.0, "same")

    found = search(DEFAULTS, ["bf16"], [], attempt)
    assert odd not in (found.configs.tiles[kernel, "bf16", "decode"] for kernel in KERNELS)


@pytest.mark.parametrize("dtype", ["bf16", "float32"])
def test_attentions_tiles_divide_what_a_context_is_cut_into(dtype: str):
    tiles = list(attention_space(dtype))
    assert len(tiles) == len(set(tiles)) > 4
    assert all(512 % tile.keys == 0 for tile in tiles)


@pytest.fixture
def counted() -> tuple[list[int], TuneWork]:
    """Work whose timer runs it once and says a made-up time."""
    calls: list[int] = []

    def timer(run) -> float:
        run()
        calls.append(1)
        return 0.25

    return calls, TuneWork(SHAPE, torch.device("cpu"), timer)


@pytest.mark.parametrize("format", ["bf16", "int4"])
def test_every_product_runs_and_computes_the_same_bits_in_every_tile(counted, format: str):
    calls, work = counted
    for kernel in KERNELS:
        trials = [
            work(Work(kernel, format, variant), tile)
            for variant, tile in zip(VARIANTS, (Tile(16, 64, 4, 1), Tile(64, 128, 4, 1)), strict=True)
        ]
        assert all(trial is not None and trial.seconds == 0.25 for trial in trials)
        assert len({trial.bits for trial in trials if trial is not None}) == 1
    assert len(calls) == len(KERNELS) * len(VARIANTS)


def test_attention_runs_as_decode_and_as_a_chunk(counted):
    calls, work = counted
    for variant in VARIANTS:
        assert work(Work("attention", "bf16", variant), AttentionTile(16, 64, 4, 1)) is not None
    assert len(calls) == 2


def test_a_tile_that_computes_something_else_is_not_taken(counted, monkeypatch):
    calls, work = counted
    monkeypatch.setattr("kernels.gpu.tune_work.linear", lambda rows, *args: torch.zeros(rows.num_rows, 128))
    assert work(Work("linear", "bf16", "decode"), Tile(16, 64, 4, 1)) is None
    assert not calls


def test_a_tile_that_does_not_fit_the_gpu_is_not_taken(counted, monkeypatch):
    from triton.runtime.errors import OutOfResources

    def refuse(*args: object) -> None:
        raise OutOfResources(300_000, 232_448, "shared memory")

    calls, work = counted
    monkeypatch.setattr("kernels.gpu.tune_work.linear", refuse)
    assert work(Work("linear", "bf16", "decode"), Tile(16, 64, 4, 1)) is None
    assert not calls


def test_what_was_tuned_is_found_by_the_gpus_name(tmp_path: Path, monkeypatch):
    monkeypatch.setattr("kernels.gpu.tune.search_space", lambda *_: [Tile(32, 64, 4, 1)])
    monkeypatch.setattr("kernels.gpu.tune.attention_space", lambda _: [])
    monkeypatch.setattr("kernels.gpu.tune_work.TuneShape", lambda **_: SHAPE)
    times = iter([2.0] * 4 + [1.0] * 100)  # the first few of what is tried are slow
    report = tune_on(torch.device("cpu"), ("Some GPU 9000", "interpreter"), ["int8"], lambda run: next(times), tmp_path)
    assert report.path == tmp_path / "some-gpu-9000.json"
    found = load_configs("Some GPU 9000", "sm_90", tmp_path)
    assert found.name == "some-gpu-9000"
    assert not report.failed
    assert found.tiles["expert_gate_up", "int8", "decode"] in (
        load_configs("", "interpreter").tiles["expert_gate_up", "int8", "decode"],
        Tile(32, 64, 4, 1),
    )
    assert {gain.kernel for gain in report.gains} == {*KERNELS, "attention"}


def test_without_a_gpu_and_for_unknown_formats_there_is_a_clear_refusal(tmp_path: Path):
    with pytest.raises(ConfigError, match="unknown format 'int3'; known: "):
        tune(["int3"], tmp_path)
    if not torch.cuda.is_available():
        with pytest.raises(ConfigError, match="no CUDA device: tiles are tuned on the GPU that they are for"):
            tune(["int4"], tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_directory_that_cannot_be_written_is_refused_before_anything_is_tried(tmp_path: Path):
    occupied = tmp_path / "file"
    occupied.touch()
    with pytest.raises(ConfigError, match="name another by --out"):
        tune_on(torch.device("cpu"), ("GPU", "interpreter"), ["int4"], lambda run: 1.0, occupied)


def test_sizes_that_are_asked_for_replace_the_defaults():
    assert replace(TuneShape(), decode_rows=4).num_rows("decode") == 4
    assert TuneShape().num_rows("prefill") == 2048
