"""What refactoring learns: which neurons are shared, which form each expert, and the routers. One small file."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from engine.errors import CheckpointError, ConfigError
from engine.models.spec import PregateSpec
from engine.refactor.healing import Healing
from engine.refactor.llama_config import LlamaConfig

_FORMAT = "foregate-refactor-plan-2"


@dataclass(frozen=True, slots=True, kw_only=True)
class SplitSettings:
    """How FFNs are cut: `shared_size` neurons always on, the rest in `num_experts` equal experts, some active.

    Those of `dense_layers` stay whole: where leaving neurons out costs most, a budget is better spent on all of them.
    """

    num_experts: int = 16
    shared_size: int = 512
    num_active: int = 12
    dense_layers: tuple[int, ...] = ()

    def expert_size(self, intermediate_size: int) -> int:
        """Neurons per expert. Raises `ConfigError` when the neurons cannot be cut that way."""
        routed = intermediate_size - self.shared_size
        if self.shared_size < 1 or self.num_experts < 1 or routed < self.num_experts or routed % self.num_experts:
            raise ConfigError(
                f"cannot cut {intermediate_size} neurons into {self.shared_size} shared ones and {self.num_experts} "
                f"equal experts; choose shared_size so that {intermediate_size} - shared_size is a multiple of "
                f"{self.num_experts}"
            )
        if not 1 <= self.num_active <= self.num_experts:
            raise ConfigError(f"num_active must be 1..{self.num_experts}, got {self.num_active}")
        return routed // self.num_experts

    def split_layers(self, num_layers: int) -> tuple[int, ...]:
        """The layers that have experts. Raises `ConfigError` when there are none, or `dense_layers` names another."""
        split = tuple(layer for layer in range(num_layers) if layer not in self.dense_layers)
        if not split or any(not 0 <= layer < num_layers for layer in self.dense_layers):
            raise ConfigError(f"dense_layers must leave some of the layers 0..{num_layers - 1}: {self.dense_layers}")
        return split

    def active_share(self, config: LlamaConfig) -> float:
        """Share of the neurons of all FFNs that one token uses."""
        size = config.intermediate_size
        num_split = len(self.split_layers(config.num_hidden_layers))
        left_out = (self.num_experts - self.num_active) * self.expert_size(size)
        return 1 - num_split * left_out / (config.num_hidden_layers * size)


@dataclass(frozen=True, slots=True)
class LayerPlan:
    """One split layer: neuron order [I] int64 (shared ones first, then expert after expert) and router, float32."""

    permutation: Tensor
    router_weight: Tensor  # [E, H]
    router_bias: Tensor  # [E]


@dataclass(frozen=True, slots=True)
class PregatePlan:
    """The second router: parameters by their name in `engine.refactor.pregate.PregateModel`, float16."""

    spec: PregateSpec
    parameters: dict[str, Tensor]


@dataclass(frozen=True, slots=True, kw_only=True)
class RefactorPlan:
    """Every layer's plan, what heals the split, and the pre-gate.

    For the checkpoint whose `engine.refactor.source.fingerprint` is `source_sha256`.
    """

    settings: SplitSettings
    source_sha256: str
    layers: list[LayerPlan]  # of the layers that are split, in order
    healing: Healing | None = None
    pregate: PregatePlan | None = None

    def check(self, config: LlamaConfig) -> None:
        """Raises `CheckpointError` unless the plan has the model's shape and its permutations are permutations."""
        size = config.intermediate_size
        split = self.settings.split_layers(config.num_hidden_layers)
        if len(self.layers) != len(split):
            raise CheckpointError(f"the plan has {len(self.layers)} split layers, the model {len(split)}")
        for index, layer in zip(split, self.layers, strict=True):
            if not torch.equal(layer.permutation.sort().values, torch.arange(size)):
                raise CheckpointError(f"the plan's layer {index} is not a permutation of the model's {size} neurons")
            if layer.router_weight.shape != (self.settings.num_experts, config.hidden_size):
                raise CheckpointError(f"the plan's layer {index} has a router of shape {layer.router_weight.shape}")
            if layer.router_bias.shape != (self.settings.num_experts,):
                raise CheckpointError(f"the plan's layer {index} has a bias of shape {layer.router_bias.shape}")
        if self.healing is not None:
            self.healing.check(config)

    def by_layer(self, num_layers: int) -> list[LayerPlan | None]:
        """A `LayerPlan`, or None where the layer is dense, for each of the model's layers."""
        layers = iter(self.layers)
        return [None if i in self.settings.dense_layers else next(layers) for i in range(num_layers)]

    def rounded(self) -> RefactorPlan:
        """As its file keeps it: router weights have passed through float16."""
        layers = [
            LayerPlan(x.permutation, x.router_weight.to(torch.float16).float(), x.router_bias) for x in self.layers
        ]
        return replace(self, layers=layers)

    def to_bytes(self) -> bytes:
        """A safetensors file: permutation uint16 [L, I], router.weight float16 [L, E, H], .bias float32 [L, E].

        Beside these the healing's factors and norms and the pre-gate's parameters, where there are any, in float16.
        """
        permutations = torch.stack([layer.permutation for layer in self.layers])
        if permutations.shape[1] > 1 << 16:
            raise CheckpointError(f"a plan holds at most 65536 neurons a layer, got {permutations.shape[1]}")
        tensors = {
            "permutation": permutations.to(torch.uint16),
            "router.weight": torch.stack([layer.router_weight for layer in self.layers]).to(torch.float16),
            "router.bias": torch.stack([layer.router_bias for layer in self.layers]),
        }
        if self.healing is not None:
            tensors |= self.healing.tensors()
        if self.pregate is not None:
            tensors |= {f"pregate.{name}": tensor for name, tensor in self.pregate.parameters.items()}
        about: dict[str, Any] = {
            "format": _FORMAT,
            "settings": asdict(self.settings),
            "source_sha256": self.source_sha256,
            "pregate": None if self.pregate is None else asdict(self.pregate.spec),
        }
        # one key only: safetensors keeps metadata in a map without order, and the file must come out byte-identical
        serialised: bytes = save(tensors, metadata={"foregate": json.dumps(about, sort_keys=True)})
        return serialised

    def sha256(self) -> str:
        """Hash of the plan's file."""
        return hashlib.sha256(self.to_bytes()).hexdigest()

    @classmethod
    def load(cls, path: Path) -> RefactorPlan:
        """Read what `to_bytes` made. Raises `CheckpointError` when the file is missing, damaged or something else."""
        try:
            with safe_open(path, framework="pt") as file:
                about = json.loads((file.metadata() or {}).get("foregate", "{}"))
                if about.get("format") != _FORMAT:
                    raise CheckpointError(f"{path} is not a refactoring plan ({_FORMAT})")
                tensors = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118 (no mapping)
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"cannot read the plan {path}: {error}") from error
        parts = tensors["permutation"].to(torch.int64), tensors["router.weight"].float(), tensors["router.bias"]
        layers = [LayerPlan(*layer) for layer in zip(*parts, strict=True)]
        pregate = None
        if about["pregate"] is not None:
            names = [name for name in tensors if name.startswith("pregate.")]
            parameters = {name.removeprefix("pregate."): tensors[name] for name in names}
            pregate = PregatePlan(PregateSpec(**about["pregate"]), parameters)
        settings = about["settings"] | {"dense_layers": tuple(about["settings"]["dense_layers"])}
        return cls(
            settings=SplitSettings(**settings),
            source_sha256=about["source_sha256"],
            layers=layers,
            healing=Healing.of_tensors(tensors),
            pregate=pregate,
        )
