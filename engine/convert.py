"""Checkpoint -> packed expert file, once per model and format."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from pathlib import Path

import torch

from cache.expert_key import ExpertKey
from cache.packed_file import PackedFileError, read_packed_header, write_packed_file
from engine.checkpoint import Checkpoint
from engine.config import format_nbytes
from engine.errors import CheckpointError, ConfigError
from engine.models.spec import MoeSpec
from kernels.quant.formats import FORMATS, ExpertWeights
from kernels.quant.layout import RecordLayout

_log = logging.getLogger(__name__)

Progress = Callable[[str, int, int], None]


def convert(model: Path, format: str, packed_dir: Path | None = None, progress: Progress | None = None) -> Path:
    """Pack a checkpoint's experts in `format` and return the file; one that is there and fits is kept as it is.

    Raises `CheckpointError` for a checkpoint without experts or with files missing, `ConfigError` for a format that
    is unknown, cannot hold the experts' shape or does not fit on the disk.
    """
    return ensure_packed(Checkpoint(model), format, packed_dir, progress)


def ensure_packed(
    checkpoint: Checkpoint, format: str, packed_dir: Path | None = None, progress: Progress | None = None
) -> Path:
    """As `convert`, of an open checkpoint. A file of another checkpoint is made anew; a damaged one is refused."""
    moe = checkpoint.spec.moe
    if moe is None:
        raise CheckpointError(f"{checkpoint.directory.name} has no experts to pack")
    layout = expert_layout(checkpoint, format)
    path = packed_path(checkpoint, format, packed_dir)
    if path.exists():
        header = read_packed_header(path)
        if header.source == checkpoint.fingerprint:
            if (header.format, header.record_nbytes, len(header.keys)) != (
                format,
                layout.nbytes,
                len(moe.layers) * moe.num_experts,
            ):
                raise PackedFileError(
                    f"packed expert file {path.name} holds {len(header.keys)} records of format {header.format}, "
                    "not what its name says; delete it and run `foregate convert` again"
                )
            return path
        _log.warning("%s was made from another checkpoint: packing the experts anew", path.name)
    try:
        _pack(checkpoint, moe, layout, path, progress)
    finally:
        checkpoint.close()
    return path


def packed_path(checkpoint: Checkpoint, format: str, packed_dir: Path | None) -> Path:
    """Where a checkpoint's experts of a format are packed."""
    directory = packed_dir / checkpoint.directory.resolve().name if packed_dir else checkpoint.directory / "foregate"
    return directory / f"experts.{format}.safetensors"


def expert_layout(checkpoint: Checkpoint, format: str) -> RecordLayout:
    """The format's record layout for this checkpoint's experts; raises `ConfigError` with the cure."""
    if format not in FORMATS:
        raise ConfigError(f"unknown expert format {format!r}; known: {', '.join(FORMATS)}")
    moe = checkpoint.spec.moe
    assert moe is not None
    try:
        return FORMATS[format].layout(checkpoint.spec.hidden_size, moe.intermediate_size)
    except ValueError as error:
        raise ConfigError(str(error)) from error


def _pack(
    checkpoint: Checkpoint,
    moe: MoeSpec,
    layout: RecordLayout,
    path: Path,
    progress: Progress | None,
) -> None:
    keys = [ExpertKey(layer, expert) for layer in moe.layers for expert in range(moe.num_experts)]
    record = torch.zeros(layout.nbytes, dtype=torch.uint8)
    record_bytes = memoryview(record.numpy().data)

    def make_record(key: ExpertKey) -> memoryview:
        record.zero_()
        FORMATS[layout.format].pack(_expert_weights(checkpoint, moe, key), record)
        return record_bytes

    def tell(done: int, total: int) -> None:
        if progress is not None:
            progress(f"packing experts as {layout.format}", done, total)

    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        disk = os.statvfs(path.parent)
        needed, free = len(keys) * layout.nbytes, disk.f_bavail * disk.f_frsize
        if needed > free:
            raise ConfigError(
                f"packing the experts as {layout.format} needs {format_nbytes(needed)} on disk, "
                f"{format_nbytes(free)} are free; make room or choose another --packed-dir"
            )
        write_packed_file(
            path,
            format=layout.format,
            hidden_size=layout.hidden_size,
            intermediate_size=layout.intermediate_size,
            source=checkpoint.fingerprint,
            record_nbytes=layout.nbytes,
            keys=keys,
            make_record=make_record,
            progress=tell,
        )
    except OSError as error:
        raise ConfigError(
            f"cannot write packed experts to {path.parent}: {error.strerror}; choose another --packed-dir"
        ) from error


def _expert_weights(checkpoint: Checkpoint, moe: MoeSpec, key: ExpertKey) -> ExpertWeights:
    inward = (moe.intermediate_size, checkpoint.spec.hidden_size)

    def load(template: str, shape: tuple[int, int]) -> torch.Tensor:
        name = template.format(layer=key.layer, expert=key.expert)
        return checkpoint.tensor(f"{name}.weight", shape).float()

    return ExpertWeights(load(moe.gate, inward), load(moe.up, inward), load(moe.down, inward[::-1]))
