"""Where the learned probe of a model lies, beside its packed experts, and what is in the file."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors.torch import safe_open, save_file
from torch import Tensor

from engine.checkpoint import Checkpoint
from engine.config import CacheConfig
from engine.convert import packed_path
from engine.layers.foresight import MAX_DISTANCE


def probe_path(config: CacheConfig, checkpoint: Checkpoint) -> Path:
    return packed_path(checkpoint, config.format, config.packed_dir).with_name("probe.safetensors")


def save_probe(path: Path, checkpoint: Checkpoint, maps: Sequence[tuple[Tensor, Tensor]]) -> None:
    """`maps`: of each layer with experts but the last, weight [D * E, H] and bias [D * E] to the D after it."""
    tensors: dict[str, Tensor] = {}
    for index, (weight, bias) in enumerate(maps):
        tensors |= {f"{index}.weight": weight.to(torch.bfloat16), f"{index}.bias": bias}
    temporary = path.with_name(f".{path.name}.partial")
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file(tensors, temporary, metadata=_metadata(checkpoint))
    temporary.replace(path)


def load_probe(path: Path, checkpoint: Checkpoint, num_layers: int) -> list[tuple[Tensor, Tensor] | None] | None:
    """Weight [D * E, H] and bias of each layer but the last; None if there is none or it is another model's."""
    if not path.exists():
        return None
    with safe_open(path, "pt") as file:
        if file.metadata() != _metadata(checkpoint):
            return None
        parts: list[tuple[Tensor, Tensor] | None] = [
            (file.get_tensor(f"{index}.weight").float(), file.get_tensor(f"{index}.bias"))
            for index in range(num_layers - 1)
        ]
    return [*parts, None]


def _metadata(checkpoint: Checkpoint) -> dict[str, str]:
    return {"source": checkpoint.fingerprint, "max_distance": str(MAX_DISTANCE)}
