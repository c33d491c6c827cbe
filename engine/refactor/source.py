"""A dense Llama checkpoint behind one lazy face, whatever file it lies in. Knows names and bytes, not arithmetic."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from engine.errors import CheckpointError
from engine.refactor.llama_config import LlamaConfig, llama_config

_COPIED_FILES = (
    "added_tokens.json",
    "chat_template.jinja",
    "generation_config.json",
    "merges.txt",
    "special_tokens_map.json",
    "tokenizer.json",
    "tokenizer.model",
    "vocab.json",
)


class DenseSource(Protocol):
    """Tensors are read when asked for, as float32, by their Hugging Face name."""

    path: Path
    config: LlamaConfig

    @property
    def names(self) -> frozenset[str]: ...

    def tensor(self, name: str) -> Tensor:
        """Raises `CheckpointError` when there is no such tensor or it cannot be read."""

    def write_tokenizer(self, out: Path) -> None:
        """Put the tokenizer files, chat template and generation_config.json into the directory `out`."""


def open_source(path: Path) -> DenseSource:
    """Open a checkpoint directory or a .gguf file. Raises `CheckpointError`."""
    if path.is_dir():
        return DirectorySource(path)
    if path.suffix == ".gguf" and path.is_file():
        from engine.refactor.gguf_source import GgufSource

        return GgufSource(path)
    raise CheckpointError(f"{path}: neither a checkpoint directory nor a .gguf file")


def fingerprint(source: DenseSource) -> str:
    """sha256 over names, shapes, all norms and the first and last layer's down projections: cheap for any size."""
    digest = hashlib.sha256()
    last = source.config.num_hidden_layers - 1
    down = {f"model.layers.{layer}.mlp.down_proj.weight" for layer in (0, last)}
    for name in sorted(source.names):
        digest.update(name.encode())
        if name.endswith("norm.weight") or name in down:
            tensor = source.tensor(name)
            digest.update(repr(tuple(tensor.shape)).encode())
            digest.update(tensor.contiguous().numpy().tobytes())
    return digest.hexdigest()


class DirectorySource:
    """A Hugging Face directory: config.json and safetensors, in one file or in shards."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.config = llama_config(_read_json(path / "config.json"), str(path / "config.json"))
        self._file_of = _files_by_tensor(path)
        self._open: dict[Path, Any] = {}

    @property
    def names(self) -> frozenset[str]:
        return frozenset(self._file_of)

    def tensor(self, name: str) -> Tensor:
        if name not in self._file_of:
            raise CheckpointError(f"{self.path}: tensor {name!r} is missing")
        file = self._file_of[name]
        try:
            if file not in self._open:
                self._open[file] = safe_open(file, framework="pt")
            tensor: Tensor = self._open[file].get_tensor(name)
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"{file}: cannot read {name!r} ({error}); fetch the file again") from error
        return tensor.to(torch.float32)

    def write_tokenizer(self, out: Path) -> None:
        for name in _COPIED_FILES:
            if (self.path / name).is_file():
                shutil.copyfile(self.path / name, out / name)
        settings = self.path / "tokenizer_config.json"
        written = _read_json(settings) if settings.is_file() else {}
        # transformers finds the class by model_type where none is named, and ours is unknown to it
        written.setdefault("tokenizer_class", "PreTrainedTokenizerFast")
        write_json(out / "tokenizer_config.json", written)


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2, sort_keys=True, ensure_ascii=False) + "\n", encoding="utf-8")


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise CheckpointError(f"{path} is missing") from error
    except ValueError as error:
        raise CheckpointError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} is not a JSON object")
    return content


def _files_by_tensor(path: Path) -> dict[str, Path]:
    index = path / "model.safetensors.index.json"
    if index.is_file():
        files = {name: path / file for name, file in _read_json(index)["weight_map"].items()}
        missing = sorted({file.name for file in files.values() if not file.is_file()})
        if missing:
            raise CheckpointError(f"{path}: missing shard(s) {', '.join(missing)}; fetch the checkpoint again")
        return files
    single = path / "model.safetensors"
    if not single.is_file():
        raise CheckpointError(f"{path}: no model.safetensors and no model.safetensors.index.json")
    try:
        with safe_open(single, framework="pt") as file:
            return dict.fromkeys(file.keys(), single)
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{single} is damaged ({error}); fetch it again") from error
