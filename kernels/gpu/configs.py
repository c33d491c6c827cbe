"""Tuned tile sizes are data: which file holds for a GPU, and what there is to choose from."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from itertools import product
from pathlib import Path
from typing import Any

DIRECTORY = Path(__file__).parent / "configs"
KERNELS = ("linear", "expert_gate_up", "expert_down")
VARIANTS = ("decode", "prefill")
DECODE_ROWS = 16  # a product with at most this many rows (an expert's, on average) takes the variant for few


@dataclass(frozen=True, slots=True)
class Tile:
    """One program's part of a product. How inputs are gone through is not here: it is the same for every tile."""

    rows: int  # of activations; a power of two, at least 16
    outputs: int  # of the matrix; a power of two, at least 32
    num_warps: int
    num_stages: int

    @property
    def options(self) -> dict[str, int]:
        """As `launch` takes them."""
        return {"num_warps": self.num_warps, "num_stages": self.num_stages}


@dataclass(frozen=True, slots=True)
class Configs:
    """The tiles for one GPU, and its attention's."""

    name: str  # of the file that they come from
    tiles: dict[tuple[str, str, str], Tile]  # by (kernel, format, variant)
    attention: dict[str, dict[str, int]]  # by the cache's dtype; as `attention.AttentionTile` takes them

    def tile(self, kernel: str, format: str, num_rows: float) -> Tile:
        """The tile for a product of that many rows; for experts, of that many rows each on average."""
        return self.tiles[kernel, format, "decode" if num_rows <= DECODE_ROWS else "prefill"]


def load_configs(gpu: str, arch: str, directory: Path = DIRECTORY) -> Configs:
    """Of the GPU by its name if it was tuned, else its architecture's defaults; `default` where even those are missing.

    gpu: as the driver names it ("NVIDIA H100 PCIe"); arch: sm_90, gfx942, or `interpreter`.
    """
    for name in (slug(gpu), arch, "default"):
        path = directory / f"{name}.json"
        if name and path.exists():
            return read_configs(path)
    raise FileNotFoundError(f"no default.json in {directory}")


def read_configs(path: Path) -> Configs:
    """Of one file; what it does not name is as in default.json."""
    found: dict[tuple[str, str, str], Tile] = {}
    attention: dict[str, dict[str, int]] = {}
    default = DIRECTORY / "default.json"
    for each in (default, path) if path != default else (default,):
        content = json.loads(each.read_text())
        attention |= content.get("attention", {})
        for kernel, formats in content.get("tiles", {}).items():
            for format, variants in formats.items():
                for variant, tile in variants.items():
                    found[kernel, format, variant] = Tile(**tile)
    return Configs(path.stem, found, attention)


def write_configs(configs: Configs, gpu: str, directory: Path) -> Path:
    """Write tuned tiles where `load_configs` finds them for that GPU."""
    tiles: dict[str, Any] = {}
    for (kernel, format, variant), tile in sorted(configs.tiles.items()):
        tiles.setdefault(kernel, {}).setdefault(format, {})[variant] = asdict(tile)
    path = directory / f"{slug(gpu)}.json"
    path.write_text(json.dumps({"gpu": gpu, "tiles": tiles, "attention": configs.attention}, indent=1) + "\n")
    return path


def slug(gpu: str) -> str:
    """The name of a GPU as a file's: nvidia-h100-pcie."""
    return re.sub(r"[^a-z0-9]+", "-", gpu.lower()).strip("-")


def search_space(kernel: str, format: str, variant: str) -> Iterator[Tile]:
    """The tiles worth trying. Some may not fit a GPU's shared memory or registers: then they do not start.

    All give the same bits if they compile to the same tensor instructions (`compile.resources_of`), which a tuner must
    hold them to. 64 outputs are the fewest for which Hopper's are.
    """
    rows = (16, 32) if variant == "decode" else (32, 64, 128)
    outputs = (64, 128, 256) if kernel == "expert_gate_up" else (64, 128)
    for num_rows, num_outputs, num_warps, num_stages in product(rows, outputs, (4, 8), (2, 3, 4)):
        is_wide = num_rows * num_outputs > 4096
        if is_wide == (num_warps == 8) or variant == "decode":
            yield Tile(num_rows, num_outputs, num_warps, num_stages)
