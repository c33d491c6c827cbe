"""A Hugging Face checkpoint directory: its config, its tensors one at a time, its fingerprint."""

from __future__ import annotations

import json
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
import xxhash
from safetensors import SafetensorError, safe_open
from torch import Tensor

from engine.errors import CheckpointError
from engine.models import FAMILIES
from engine.models.spec import ModelSpec

_OWN_MODEL_TYPES = ("foregate_llama_moe",)  # not known to transformers
_NUM_SAMPLES, _SAMPLE_NBYTES = 64, 4096


class Checkpoint:
    """Raises `CheckpointError` on construction if files are missing or the architecture is not known."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        if not directory.is_dir():
            raise CheckpointError(f"model directory {directory} does not exist")
        self.config = _read_config(directory)
        self.model_type = str(self.config.get("model_type"))
        if self.model_type not in FAMILIES:
            raise CheckpointError(f"model type {self.model_type!r} is not known; known: {', '.join(sorted(FAMILIES))}")
        try:
            self.spec: ModelSpec = FAMILIES[self.model_type](self.config)
        except KeyError as error:
            raise CheckpointError(f"config.json: {error.args[0]} is missing") from error
        except (TypeError, ZeroDivisionError) as error:
            raise CheckpointError(f"config.json cannot be read as {self.model_type}: {error}") from error
        self._shard_of = _weight_map(directory)
        self._open_shard: tuple[str, Any] | None = None  # the one read last, since neighbours are read in a row

    @property
    def shards(self) -> list[Path]:
        return [self.directory / name for name in sorted(set(self._shard_of.values()))]

    def __contains__(self, name: str) -> bool:
        return name in self._shard_of

    def tensor(self, name: str, shape: tuple[int, ...], dtype: torch.dtype | None = None) -> Tensor:
        """A copy of one tensor, in its own dtype or in `dtype`; checked against the shape that the config implies."""
        if name not in self._shard_of:
            raise CheckpointError(f"checkpoint has no tensor {name}; it is incomplete or of another architecture")
        shard = self._shard_of[name]
        try:
            if self._open_shard is None or self._open_shard[0] != shard:
                self._open_shard = shard, safe_open(self.directory / shard, framework="pt")
            tensor: Tensor = self._open_shard[1].get_tensor(name)
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"cannot read {name} from {shard}: {error}") from error
        if tuple(tensor.shape) != shape:
            raise CheckpointError(f"tensor {name} is {tuple(tensor.shape)}, config.json implies {shape}")
        return tensor.to(dtype or tensor.dtype, copy=True)  # a copy, so that close() unmaps the file

    def close(self) -> None:
        """Unmap the shard read last; reading on opens it again."""
        self._open_shard = None

    @cached_property
    def fingerprint(self) -> str:
        """xxh3_128 over config.json and, of each shard, its name, size, header and 64 evenly spread pages.

        Whoever edits weights in place between those pages is not noticed; a new or another checkpoint is.
        """
        digest = xxhash.xxh3_128()
        digest.update((self.directory / "config.json").read_bytes())
        for shard in self.shards:
            size = shard.stat().st_size
            digest.update(f"{shard.name}:{size}".encode())
            with shard.open("rb") as file:
                header_nbytes = int.from_bytes(file.read(8), "little")
                digest.update(file.read(min(header_nbytes, size)))
                for i in range(_NUM_SAMPLES):
                    file.seek(max(0, size - _SAMPLE_NBYTES) * i // (_NUM_SAMPLES - 1))
                    digest.update(file.read(_SAMPLE_NBYTES))
        return digest.hexdigest()

    def eos_token_ids(self) -> tuple[int, ...]:
        """Ids that end a sequence, from generation_config.json, else from config.json."""
        path = self.directory / "generation_config.json"
        generation = _read_json(path) if path.exists() else {}
        eos = generation.get("eos_token_id", self.config.get("eos_token_id"))
        ids = eos if isinstance(eos, list) else [] if eos is None else [eos]
        return tuple(int(token_id) for token_id in ids)


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"cannot read {path.name} of the model directory: {error}") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path.name} of the model directory is not a JSON object")
    return content


def _read_config(directory: Path) -> dict[str, Any]:
    path = directory / "config.json"
    if not path.exists():
        raise CheckpointError(f"{directory} is not a model directory: it has no config.json")
    raw = _read_json(path)
    if raw.get("model_type") not in FAMILIES or raw["model_type"] in _OWN_MODEL_TYPES:
        return raw
    from transformers import AutoConfig  # fills in the family's defaults for what the file leaves out

    try:
        config: dict[str, Any] = AutoConfig.from_pretrained(directory, local_files_only=True).to_dict()
    except Exception as error:  # transformers raises many kinds for a config that it cannot take
        raise CheckpointError(f"config.json cannot be read: {error}") from error
    return config


def _weight_map(directory: Path) -> dict[str, str]:
    """Tensor name -> shard file name; every shard must be there and have a readable header."""
    index_path = directory / "model.safetensors.index.json"
    if index_path.exists():
        declared = _read_json(index_path).get("weight_map")
        if not isinstance(declared, dict):
            raise CheckpointError("model.safetensors.index.json has no weight_map")
        names = sorted({Path(str(shard)).name for shard in declared.values()})
    elif (directory / "model.safetensors").exists():
        declared, names = None, ["model.safetensors"]
    else:
        raise CheckpointError(f"{directory} has no model.safetensors and no model.safetensors.index.json")
    found: dict[str, str] = {}
    for name in names:
        path = directory / name
        if not path.exists():
            raise CheckpointError(f"checkpoint shard {name} is missing; download the model again")
        try:
            with safe_open(path, framework="pt") as file:
                found.update(dict.fromkeys(file.keys(), name))
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"checkpoint shard {name} is damaged ({error}); download the model again") from error
    missing = sorted(set(declared or ()) - set(found))
    if missing:
        raise CheckpointError(f"the checkpoint's index names {missing[0]}, which is in none of its shards")
    return found
