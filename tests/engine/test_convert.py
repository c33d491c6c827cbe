from __future__ import annotations

import errno
import os
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
from safetensors import safe_open

import engine.convert as convert_module
from cache.expert_key import ExpertKey
from cache.packed_file import PackedFileError
from engine.checkpoint import Checkpoint
from engine.convert import convert
from engine.errors import CheckpointError, ConfigError
from kernels.quant.formats import FORMATS


@pytest.fixture
def model(checkpoint, tmp_path: Path) -> Path:
    source, _ = checkpoint("olmoe")
    return Path(shutil.copytree(source, tmp_path / "model", ignore=shutil.ignore_patterns("foregate")))


@pytest.mark.parametrize("name", FORMATS)
def test_each_record_holds_its_experts_weights(model: Path, name: str):
    path, opened = convert(model, name), Checkpoint(model)
    layout = FORMATS[name].layout(64, 32)
    with safe_open(path, framework="pt") as file:
        for key in (ExpertKey(0, 0), ExpertKey(1, 5)):
            unpacked = FORMATS[name].unpack(file.get_tensor(key.record_name), layout)
            for part, proj, shape in zip(unpacked, ("gate", "up", "down"), ((32, 64), (32, 64), (64, 32)), strict=True):
                weight = opened.tensor(f"model.layers.{key.layer}.mlp.experts.{key.expert}.{proj}_proj.weight", shape)
                assert (part - weight).norm() <= 0.1 * weight.norm()


def test_the_file_is_made_once_and_is_the_same_bytes_wherever_it_is_made(model: Path, tmp_path: Path):
    told: list[tuple[str, int, int]] = []
    path = convert(model, "int4", progress=lambda *args: told.append(args))
    assert told[-1] == ("packing experts as int4", 16, 16)
    made_at = path.stat().st_mtime_ns
    assert convert(model, "int4", progress=lambda *args: pytest.fail("packed again")) == path
    assert path.stat().st_mtime_ns == made_at
    elsewhere = convert(model, "int4", packed_dir=tmp_path / "packed")
    assert elsewhere.is_relative_to(tmp_path / "packed")
    assert elsewhere.read_bytes() == path.read_bytes()


def test_a_file_of_another_checkpoint_is_made_anew_with_a_warning(model: Path, caplog):
    path = convert(model, "int8")
    before = path.read_bytes()
    config = model / "config.json"
    config.write_text(config.read_text() + " ")
    convert(model, "int8")
    assert "made from another checkpoint" in caplog.text
    assert path.read_bytes() != before


def test_a_truncated_file_is_refused_not_silently_made_anew(model: Path):
    path = convert(model, "int8")
    path.write_bytes(path.read_bytes()[:-4096])
    with pytest.raises(PackedFileError, match="truncated"):
        convert(model, "int8")


def test_a_file_of_another_format_under_this_ones_name_is_refused(model: Path):
    shutil.copyfile(convert(model, "int4"), model / "foregate" / "experts.int8.safetensors")
    with pytest.raises(PackedFileError, match=r"holds 16 records of format int4, not what its name says; delete it"):
        convert(model, "int8")


def test_an_unknown_format_and_a_model_without_experts_are_refused(model: Path, checkpoint):
    with pytest.raises(ConfigError, match="unknown expert format 'int3'; known: float32, bf16, int8, int4"):
        convert(model, "int3")
    with pytest.raises(CheckpointError, match="has no experts to pack"):
        convert(checkpoint("llama-llama3-rope")[0], "int8")


def test_a_disk_without_room_is_noticed_before_anything_is_written(model: Path, monkeypatch):
    monkeypatch.setattr(convert_module.os, "statvfs", lambda path: SimpleNamespace(f_bavail=1, f_frsize=4096))
    with pytest.raises(
        ConfigError, match=r"needs .* on disk, 4.0KiB are free; make room or choose another --packed-dir"
    ):
        convert(model, "int8")
    assert list((model / "foregate").iterdir()) == []


def test_a_disk_that_fills_while_packing_leaves_nothing_and_says_so(model: Path, monkeypatch):
    def fail(fd: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("cache.packed_file.os.fsync", fail)
    with pytest.raises(ConfigError, match="No space left on device"):
        convert(model, "int8")
    assert list((model / "foregate").iterdir()) == []
