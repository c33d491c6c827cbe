"""Chooses how a model's coming routing is foretold."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from cache.predictors import LEARNED, PREDICTORS
from cache.predictors.fusion import Fusion
from cache.predictors.path import PATH
from cache.prefetcher import Prefetcher
from engine.checkpoint import Checkpoint
from engine.config import CacheConfig, EngineConfig
from engine.errors import ConfigError
from engine.layers.foresight import (
    MAX_DISTANCE,
    ExactForesight,
    Gate,
    LearnedForesight,
    Observers,
    RoutingObserver,
    StreamedLayers,
)
from engine.layers.moe import ExpertArena
from engine.loader import expert_keys
from engine.models.spec import ModelSpec, MoeSpec
from engine.path_router import load_path_router, path_router_path
from engine.probe_file import load_probe, probe_path
from kernels.backend import Backend, Linear

STREAM = "stream"


class StackedGate:
    """One product for the logits of several layers ahead."""

    def __init__(self, linears: list[Linear | None], num_experts: int) -> None:
        """`linears`: of each layer, to the logits [D * E] of those after it; None: nothing is known from there."""
        self._linears = linears
        self._num_experts = num_experts

    def __call__(self, index: int, x: Tensor) -> NDArray[np.float32] | None:
        linear = self._linears[index]
        if linear is None:
            return None
        logits = linear(x).view(len(x), -1, self._num_experts)
        return np.asarray(logits.transpose(0, 1).cpu().numpy(), dtype=np.float32)


def make_foresight(
    config: EngineConfig, spec: ModelSpec, experts: ExpertArena | None, checkpoint: Checkpoint, backend: Backend
) -> RoutingObserver | None:
    """What reads experts ahead. Raises `ConfigError` for a name that is not known.

    The configured predictor is off, one of `cache.predictors.PREDICTORS`, `stream` (whole layers where most of their
    experts are needed), several joined by +, or auto, all that the model has, fused. A pre-gated model's routing is
    known, and needs none; where all experts fit in memory nothing is read ahead.
    """
    predictor = config.cache.predictor
    names = [*PREDICTORS, STREAM] if predictor == "auto" else predictor.split("+")
    if predictor != "off" and (unknown := [name for name in names if name not in (*PREDICTORS, STREAM)]):
        known_names = ", ".join((*PREDICTORS, STREAM))
        raise ConfigError(f"unknown predictor {unknown[0]!r}; known: auto, off, {known_names}, or a+b")
    moe = spec.moe
    if predictor == "off" or experts is None or moe is None:
        return None
    prefetcher = Prefetcher(experts.cache, len(moe.layers))
    keys = [expert_keys(moe, layer) for layer in moe.layers]
    if spec.pregate is not None:
        return ExactForesight(prefetcher, keys)
    if experts.cache.holds_all:
        return None
    stream = [StreamedLayers(experts.cache, keys)] if STREAM in names else []
    names = [name for name in names if name != STREAM]
    if not names:
        return Observers(stream)
    gates = make_gates(names, checkpoint, backend, config.cache)
    path = load_path_router(path_router_path(config.cache, checkpoint), checkpoint) if PATH in names else None
    known = PREDICTORS.keys() - LEARNED | gates.keys() | ({PATH} if path is not None else set())
    if predictor != "auto" and (unlearned := [name for name in names if name not in known]):
        raise ConfigError(
            f"this model has no {unlearned[0]}: run `foregate train-predictor` first, or choose another predictor"
        )
    shape = (len(moe.layers), moe.num_experts, moe.num_active)
    fusion = Fusion([PREDICTORS[name](*shape) for name in names if name in known], shape, MAX_DISTANCE)
    return Observers([LearnedForesight(prefetcher, keys, fusion, gates, path), *stream])


def make_gates(names: Sequence[str], checkpoint: Checkpoint, backend: Backend, config: CacheConfig) -> dict[str, Gate]:
    """The linear maps of those of the named predictors that have one; the probe's only if it was learned."""
    spec = checkpoint.spec
    moe = spec.moe
    assert moe is not None
    gates: dict[str, Gate] = {}
    if "stale_gate" in names:
        gates["stale_gate"] = _stale_gate(spec, moe, checkpoint, backend)
    if "probe" in names and (probe := _probe(config, moe, checkpoint, backend)) is not None:
        gates["probe"] = probe
    return gates


def gate_weights(spec: ModelSpec, moe: MoeSpec, checkpoint: Checkpoint) -> tuple[list[Tensor], list[Tensor]]:
    """The layers' own routers: weight [E, H] and bias [E] of each."""
    shape = (moe.num_experts, spec.hidden_size)
    names = [moe.router.format(layer=layer) for layer in moe.layers]
    weights = [checkpoint.tensor(f"{name}.weight", shape, torch.float32) for name in names]
    no_bias = torch.zeros(moe.num_experts)
    biases = [
        checkpoint.tensor(f"{name}.bias", shape[:1], torch.float32) if moe.router_bias else no_bias for name in names
    ]
    return weights, biases


def _stale_gate(spec: ModelSpec, moe: MoeSpec, checkpoint: Checkpoint, backend: Backend) -> Gate:
    weights, biases = gate_weights(spec, moe, checkpoint)
    parts: list[tuple[Tensor, Tensor] | None] = []
    for index in range(len(weights)):
        after = slice(index + 1, index + 1 + MAX_DISTANCE)
        parts.append((torch.cat(weights[after]), torch.cat(biases[after])) if weights[after] else None)
    return _stacked(parts, moe.num_experts, backend)


def _probe(config: CacheConfig, moe: MoeSpec, checkpoint: Checkpoint, backend: Backend) -> Gate | None:
    parts = load_probe(probe_path(config, checkpoint), checkpoint, len(moe.layers))
    return None if parts is None else _stacked(parts, moe.num_experts, backend)


def _stacked(parts: list[tuple[Tensor, Tensor] | None], num_experts: int, backend: Backend) -> Gate:
    return StackedGate(
        [None if part is None else backend.make_linear(part[0], part[1], "float32") for part in parts], num_experts
    )
