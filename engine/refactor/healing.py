"""Low-rank changes that let a split model do without the experts it leaves out, and a source that has them applied."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from engine.errors import CheckpointError
from engine.refactor.llama_config import LlamaConfig
from engine.refactor.source import DenseSource

PRODUCTS = ("qkv", "o", "gate_up", "down")
NORMS = ("input_layernorm", "post_attention_layernorm")
_LAYER = re.compile(r"model\.layers\.(\d+)\.(.+)\.weight")
_EXACT_BOUND = 16.0  # products of float16 are multiples of 2^-48: below this, float64 adds them without rounding


def product_sizes(config: LlamaConfig) -> dict[str, tuple[int, int]]:
    """Outputs and inputs of each product that is changed: q, k, v one below another, and gate above up."""
    q_size, kv_size = (n * config.head_dim for n in (config.num_attention_heads, config.num_key_value_heads))
    hidden_size, inner_size = config.hidden_size, config.intermediate_size
    return {
        "qkv": (q_size + 2 * kv_size, hidden_size),
        "o": (hidden_size, q_size),
        "gate_up": (2 * inner_size, hidden_size),
        "down": (hidden_size, inner_size),
    }


@dataclass(frozen=True, slots=True)
class Healing:
    """What is added to the products of n layers, b @ a, and the norms that replace the dense model's there.

    Values have passed through float16, so that b @ a is exact in float64: the same bits on any machine.
    """

    layers: tuple[int, ...]
    factors: dict[str, tuple[Tensor, Tensor]]  # of PRODUCTS: a [n, r, inputs], b [n, outputs, r], float16
    norms: dict[str, Tensor]  # of NORMS: float16 [n, H]
    final_norm: Tensor  # float16 [H]

    def check(self, config: LlamaConfig) -> None:
        """Raises `CheckpointError` unless it has the model's shape."""
        layers, hidden_size = len(self.layers), config.hidden_size
        if list(self.layers) != sorted(set(self.layers) & set(range(config.num_hidden_layers))):
            raise CheckpointError(f"the plan's healing is of layers that the model has not: {self.layers}")
        for name, (outputs, inputs) in product_sizes(config).items():
            a, b = self.factors[name]
            rank = a.shape[1]
            if a.shape != (layers, rank, inputs) or b.shape != (layers, outputs, rank):
                raise CheckpointError(f"the plan's healing of {name} does not fit the model")
        if any(norm.shape != (layers, hidden_size) for norm in self.norms.values()):
            raise CheckpointError("the plan's norms do not fit the model")

    def delta(self, layer: int, product: str) -> Tensor:
        """What is added to that product's weight, float64 [outputs, inputs]."""
        a, b = (factor[self.layers.index(layer)].double() for factor in self.factors[product])
        if float((b.abs() @ a.abs()).max()) >= _EXACT_BOUND:
            raise CheckpointError(f"the plan's healing of {product} in layer {layer} is out of bounds")
        return b @ a

    def tensors(self) -> dict[str, Tensor]:
        """By name, as the plan's file has them."""
        named = {
            f"healing.{name}.{x}": f for name, pair in self.factors.items() for x, f in zip("ab", pair, strict=True)
        }
        named |= {f"healing.{name}": norm for name, norm in self.norms.items()}
        return named | {"healing.layers": torch.tensor(self.layers), "healing.norm": self.final_norm}

    @classmethod
    def of_tensors(cls, tensors: dict[str, Tensor]) -> Healing | None:
        """What `tensors` gave; None where there is no healing among them."""
        if "healing.norm" not in tensors:
            return None
        factors = {name: (tensors[f"healing.{name}.a"], tensors[f"healing.{name}.b"]) for name in PRODUCTS}
        layers = tuple(tensors["healing.layers"].tolist())
        return cls(layers, factors, {name: tensors[f"healing.{name}"] for name in NORMS}, tensors["healing.norm"])


class HealedSource:
    """A `DenseSource` whose products and norms are healed; everything else is the dense model's."""

    def __init__(self, source: DenseSource, healing: Healing) -> None:
        self._source, self._healing = source, healing
        self.path: Path = source.path
        self.config = config = source.config
        q_size, kv_size = (n * config.head_dim for n in (config.num_attention_heads, config.num_key_value_heads))
        inner_size = config.intermediate_size
        self._rows = {  # of each weight within its product
            "self_attn.q_proj": ("qkv", 0, q_size),
            "self_attn.k_proj": ("qkv", q_size, q_size + kv_size),
            "self_attn.v_proj": ("qkv", q_size + kv_size, q_size + 2 * kv_size),
            "self_attn.o_proj": ("o", 0, config.hidden_size),
            "mlp.gate_proj": ("gate_up", 0, inner_size),
            "mlp.up_proj": ("gate_up", inner_size, 2 * inner_size),
            "mlp.down_proj": ("down", 0, config.hidden_size),
        }
        self._last: tuple[int, str, Tensor] | None = None  # the delta made last: q, k, v share one

    @property
    def names(self) -> frozenset[str]:
        return self._source.names

    def tensor(self, name: str) -> Tensor:
        if name == "model.norm.weight":
            return self._healing.final_norm.float()
        match = _LAYER.fullmatch(name)
        if match is None or int(match[1]) not in self._healing.layers:
            return self._source.tensor(name)
        layer, part = int(match[1]), match[2]
        if part in NORMS:
            return self._healing.norms[part][self._healing.layers.index(layer)].float()
        if part not in self._rows:
            return self._source.tensor(name)
        product, begin, end = self._rows[part]
        return (self._source.tensor(name).double() + self._delta(layer, product)[begin:end]).float()

    def write_tokenizer(self, out: Path) -> None:
        self._source.write_tokenizer(out)

    def _delta(self, layer: int, product: str) -> Tensor:
        if self._last is None or self._last[:2] != (layer, product):
            self._last = layer, product, self._healing.delta(layer, product)
        return self._last[2]


def healed(source: DenseSource, healing: Healing | None) -> DenseSource:
    """The source with the healing applied, if there is any."""
    return source if healing is None else HealedSource(source, healing)


def rounded(tensor: Tensor) -> Tensor:
    """As a plan's file keeps it."""
    return tensor.detach().to(torch.float16)
