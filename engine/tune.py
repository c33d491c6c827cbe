"""`foregate tune`: the fastest tiles of the GPU that is here, written where its kernels look for them."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from pathlib import Path

import msgspec
import torch

from engine.checkpoint import Checkpoint
from engine.convert import Progress, expert_layout
from engine.errors import ConfigError
from kernels.quant.formats import FORMATS

_log = logging.getLogger(__name__)

KV_DTYPES = ("bf16", "float32")


class Gain(msgspec.Struct, frozen=True):
    """How much faster than its default a tile is, on tensors of the model's shape."""

    kernel: str
    format: str
    variant: str
    tile: str
    ratio: float | None  # None: the default did not run


class TuneReport(msgspec.Struct, frozen=True):
    """What was written where; `failed`: of what no tile computed the right numbers, so that the default stays."""

    gpu: str
    path: Path
    gains: list[Gain]
    failed: list[str]


def tune(
    formats: Sequence[str],
    directory: Path | None = None,
    model: Path | None = None,
    progress: Progress | None = None,
) -> TuneReport:
    """Try tiles for minutes on the present GPU, for the shapes of a checkpoint, by default Qwen3-30B-A3B's.

    `directory`: where the file goes; by default where the kernels look. Raises `ConfigError` for unknown formats, where
    there is no GPU, or where the file cannot be written.
    """
    if unknown := [format for format in formats if format not in FORMATS]:
        raise ConfigError(f"unknown format {unknown[0]!r}; known: {', '.join(FORMATS)}")
    if not torch.cuda.is_available():
        raise ConfigError("no CUDA device: tiles are tuned on the GPU that they are for; `foregate doctor` says more")
    try:
        from triton.testing import do_bench

        from kernels.gpu.backend import device_names
        from kernels.gpu.launch import INTERPRETED
    except ImportError as error:
        raise ConfigError(f"tuning needs triton, which comes with torch for CUDA: {error}") from error
    if INTERPRETED:
        raise ConfigError("unset TRITON_INTERPRET: the interpreter has no speed to tune")
    device = torch.device("cuda")

    def seconds(run: Callable[[], object]) -> float:
        return float(do_bench(run, warmup=10, rep=40, return_mode="median")) / 1e3  # the cache is flushed in between

    return tune_on(device, device_names(device), formats, seconds, directory, model, progress)


def tune_on(
    device: torch.device,
    names: tuple[str, str],
    formats: Sequence[str],
    timer: Callable[[Callable[[], object]], float],
    directory: Path | None = None,
    model: Path | None = None,
    progress: Progress | None = None,
) -> TuneReport:
    """As `tune`, with a timer that is passed; `names`: of the GPU and its architecture."""
    from kernels.gpu.configs import DIRECTORY, Tile, load_configs, write_configs
    from kernels.gpu.tune import tune as search
    from kernels.gpu.tune_work import TuneShape, TuneWork

    gpu, arch = names
    directory = directory or DIRECTORY
    _check_writable(directory)
    shape = TuneShape() if model is None else TuneShape(**_sizes(model))
    defaults = load_configs("", arch)
    found = search(
        defaults, formats, KV_DTYPES, TuneWork(shape, device, timer), progress or (lambda name, done, total: None)
    )
    path = write_configs(found.configs, gpu, directory)
    gains = []
    for work, ratio in found.gains.items():
        if work.kernel == "attention":
            tile = "x".join(str(number) for number in found.configs.attention[work.format].values())
        else:
            chosen: Tile = found.configs.tiles[work.kernel, work.format, work.variant]
            tile = f"{chosen.rows}x{chosen.outputs}, {chosen.num_warps}w, {chosen.num_stages}s"
        gains.append(Gain(work.kernel, work.format, work.variant, tile, ratio))
    _log.info("%s: %d kernels tuned, %d left as they were", gpu, len(gains), len(found.failed))
    return TuneReport(gpu, path, gains, found.failed)


def _sizes(directory: Path) -> dict[str, int]:
    checkpoint = Checkpoint(directory)
    spec = checkpoint.spec
    if spec.moe is None:
        raise ConfigError(f"{directory.name} has no experts to tune for")
    return {
        "hidden_size": spec.hidden_size,
        "intermediate_size": expert_layout(checkpoint, "bf16").intermediate_size,
        "num_experts": spec.moe.num_experts,
        "num_active": spec.moe.num_active,
        "num_heads": spec.num_heads,
        "num_kv_heads": spec.num_kv_heads,
        "head_dim": spec.head_dim,
    }


def _check_writable(directory: Path) -> None:
    try:
        directory.mkdir(parents=True, exist_ok=True)
        probe = directory / ".tune.partial"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise ConfigError(
            f"tuned tiles cannot be written to {directory} ({error.strerror}); name another by --out"
        ) from error
