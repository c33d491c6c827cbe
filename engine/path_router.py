"""A small causal router: all layers' routing from token ids alone, before the forward pass. It foretells, never routes.

A token's embedding, in few dimensions, and two running means of those before it, through one hidden layer.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import safe_open, save_file
from torch import Tensor

from engine.checkpoint import Checkpoint
from engine.config import CacheConfig
from engine.convert import packed_path

DECAYS = (0.5, 0.9)  # of the running means, a token
_CHUNK = 4096  # rows of the vocabulary at a time

Floats = NDArray[np.float32]


def embedding_of(checkpoint: Checkpoint) -> Tensor:
    """The model's input embeddings [V, H], float32."""
    spec = checkpoint.spec
    return checkpoint.tensor("model.embed_tokens.weight", (spec.vocab_size, spec.hidden_size), torch.float32)


def reduce(embedding: Tensor, basis: Tensor) -> NDArray[np.float16]:
    """Embeddings [V, H], each of mean square 1, in the dimensions of basis [d, H] -> [V, d]."""
    reduced = np.empty((len(embedding), len(basis)), dtype=np.float16)
    for start in range(0, len(embedding), _CHUNK):
        rows = embedding[start : start + _CHUNK]
        scale = rows.square().mean(1, keepdim=True).add_(1e-12).rsqrt()
        reduced[start : start + _CHUNK] = (rows * scale @ basis.T).numpy()
    return reduced


@dataclass(slots=True)
class RunningMeans:
    """What the tokens of each request were, the latest ones above all."""

    reduced: NDArray[np.float16]  # [V, d]
    _of_requests: dict[int, Floats] = field(default_factory=dict)  # [len(DECAYS), d]

    def __call__(self, requests: Sequence[int], token_ids: Sequence[int]) -> Floats:
        """The next tokens of some requests, each request's in order -> [T, (1 + len(DECAYS)) * d]."""
        states = self.reduced[np.asarray(token_ids, dtype=np.int64)].astype(np.float32)  # [T, d]
        num_tokens, num_dims = states.shape
        features = np.empty((num_tokens, 1 + len(DECAYS), num_dims), dtype=np.float32)
        features[:, 0] = states
        decays = np.array(DECAYS, dtype=np.float32)[:, None]
        for row, request in enumerate(requests):
            means = self._of_requests.get(request)
            if means is None:
                means = np.repeat(states[row : row + 1], len(DECAYS), axis=0)
            else:
                means = means + (1.0 - decays) * (states[row] - means)
            self._of_requests[request] = means
            features[row, 1:] = means
        return features.reshape(num_tokens, -1)

    def ended(self, request: int) -> None:
        """The request is over."""
        self._of_requests.pop(request, None)


@dataclass(slots=True)
class PathRouter:
    """Weights [h, F] and [L * E, h] with their biases."""

    means: RunningMeans
    hidden: tuple[Floats, Floats]
    output: tuple[Floats, Floats]
    num_experts: int

    def __call__(self, requests: Sequence[int], token_ids: Sequence[int]) -> Floats:
        """The next tokens of some requests -> log-odds [L, T, E] of each expert of each layer to be used."""
        weight, bias = self.hidden
        inner = np.maximum(self.means(requests, token_ids) @ weight.T + bias, 0.0)
        weight, bias = self.output
        logits = (inner @ weight.T + bias).reshape(len(requests), -1, self.num_experts)
        return np.ascontiguousarray(logits.transpose(1, 0, 2), dtype=np.float32)

    def ended(self, request: int) -> None:
        """The request is over."""
        self.means.ended(request)


def path_router_path(config: CacheConfig, checkpoint: Checkpoint) -> Path:
    return packed_path(checkpoint, config.format, config.packed_dir).with_name("path.safetensors")


def save_path_router(path: Path, checkpoint: Checkpoint, tensors: dict[str, Tensor]) -> None:
    """`tensors`: basis [d, H], hidden.weight, hidden.bias, output.weight, output.bias."""
    temporary = path.with_name(f".{path.name}.partial")
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file(tensors, temporary, metadata=_metadata(checkpoint))
    temporary.replace(path)


def load_path_router(path: Path, checkpoint: Checkpoint) -> PathRouter | None:
    """None if there is none or it is another model's."""
    moe = checkpoint.spec.moe
    if moe is None or not path.exists():
        return None
    with safe_open(path, "pt") as file:
        if file.metadata() != _metadata(checkpoint):
            return None
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a dict

    def pair(name: str) -> tuple[Floats, Floats]:
        return tensors[f"{name}.weight"].float().numpy(), tensors[f"{name}.bias"].float().numpy()

    means = RunningMeans(reduce(embedding_of(checkpoint), tensors["basis"]))
    return PathRouter(means, pair("hidden"), pair("output"), moe.num_experts)


def _metadata(checkpoint: Checkpoint) -> dict[str, str]:
    return {"source": checkpoint.fingerprint, "decays": ",".join(map(str, DECAYS))}
