"""The split model as it is trained: frozen dense weights in bf16; routers, low-rank changes and norms that learn."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from engine.refactor.dense import DenseLayer, Rotary
from engine.refactor.healing import NORMS, PRODUCTS, Healing, rounded
from engine.refactor.plan import LayerPlan, RefactorPlan
from engine.refactor.source import DenseSource
from engine.refactor.student_math import Geometry, dense_layer, divergence, split_layer

_CHUNK = 512  # rows whose logits are in memory at once


@dataclass(slots=True)
class StudentLayer:
    """One layer: what is frozen, what the dense model's norms are, and what learns."""

    weights: list[Tensor]  # of PRODUCTS, bf16; neurons in the plan's order
    dense_norms: list[Tensor]  # of NORMS, float32
    norms: list[Tensor]
    factors: list[Tensor]  # a, b of each of PRODUCTS, float32
    router: list[Tensor]  # weight [E, H] and bias [E], float32; unused in dense layers
    num_active: Tensor  # int64 scalar: of the experts, all of them in dense layers
    permutation: Tensor


@dataclass(slots=True)
class Routes:
    """What the routers of the split layers said: logits [B, T, E] and whether each expert was chosen, a layer each."""

    logits: list[Tensor]
    chosen: list[Tensor]


class Student:
    """The layers before the first split one are the dense model's and do not learn: they are computed once for both."""

    def __init__(
        self, source: DenseSource, plan: RefactorPlan, *, rank: int, temperature: float, seed: int, compiled: bool
    ) -> None:
        """`compiled`: by torch.compile, two to three times as fast, but a compiler is needed and a minute."""
        config, settings = source.config, plan.settings
        self.config, self.settings = config, settings
        self._plan = plan
        self._geometry = Geometry(
            config.num_attention_heads,
            config.num_key_value_heads,
            config.head_dim,
            config.rms_norm_eps,
            settings.num_experts,
            settings.shared_size,
            temperature,
        )
        self._source = source
        self._embedding = source.tensor("model.embed_tokens.weight").to(torch.bfloat16)
        head = "model.embed_tokens.weight" if config.tie_word_embeddings else "lm_head.weight"
        self._head = source.tensor(head).to(torch.bfloat16)
        self._head_t = self._head.T.contiguous()
        self._dense_norm = source.tensor("model.norm.weight")
        self.norm = self._dense_norm.clone().requires_grad_()
        self.first_split = settings.split_layers(config.num_hidden_layers)[0]
        generator = torch.Generator().manual_seed(seed)
        self.layers = [
            _student_layer(DenseLayer.load(source, i), layer_plan, plan, rank, generator)
            for i, layer_plan in enumerate(plan.by_layer(config.num_hidden_layers))
        ]
        self._rotary = Rotary.build(config, config.max_position_embeddings)
        wrap: Callable[[Any], Any] = torch.compile if compiled else lambda function: function
        self._split_layer, self._dense_layer = wrap(split_layer), wrap(dense_layer)
        self._divergence = wrap(divergence)

    def learning(self) -> dict[str, list[Tensor]]:
        """The tensors that learn, by kind: factors, routers, norms."""
        layers = self.layers[self.first_split :]
        return {
            "factors": [t for layer in layers for t in layer.factors],
            "routers": [t for layer in layers for t in layer.router],
            "norms": [t for layer in layers for t in layer.norms] + [self.norm],
        }

    def embed(self, tokens: Tensor) -> Tensor:
        """Token ids [B, T] -> embeddings [B, T, H] in float32, from bf16."""
        return F.embedding(tokens, self._embedding).float()

    @torch.no_grad()
    def prefix(self, tokens: Tensor) -> Tensor:
        """Token ids [B, T] -> hidden states [B, T, H] before the first split layer."""
        hidden = self.embed(tokens)
        for layer in self.layers[: self.first_split]:
            hidden = self._run_dense(layer, hidden)
        return hidden

    @torch.no_grad()
    def teach(self, hidden: Tensor) -> Tensor:
        """`prefix` -> the dense model's final normed states [B, T, H]."""
        for layer in self.layers[self.first_split :]:
            hidden = self._run_dense(layer, hidden)
        return F.rms_norm(hidden, hidden.shape[-1:], self._dense_norm, self._geometry.eps)

    def run(
        self, hidden: Tensor, masks: list[Tensor] | None = None, routes: Routes | None = None
    ) -> tuple[Tensor, Tensor]:
        """`prefix` -> the split model's final normed states [B, T, H], and how uneven its experts' use is.

        masks: [B, T, E] for each split layer, instead of its router's choice. routes: what was chosen is added to it.
        """
        cos, sin = self._angles(hidden.shape[1])
        unevenness = torch.zeros(())
        given = iter(masks or [])
        for layer in self.layers[self.first_split :]:
            is_split = int(layer.num_active) < self.settings.num_experts
            mask = next(given) if masks is not None and is_split else None
            hidden, uneven, chosen, logits = self._split_layer(
                hidden, layer.norms, layer.weights, layer.factors, layer.router, layer.num_active, cos, sin, mask,
                self._geometry,
            )  # fmt: skip
            if not is_split:
                continue
            unevenness = unevenness + uneven
            if routes is not None:
                routes.chosen.append(chosen.detach().bool())
                routes.logits.append(logits.detach())
        return F.rms_norm(hidden, hidden.shape[-1:], self.norm, self._geometry.eps), unevenness / len(self._plan.layers)

    def divergence(self, student: Tensor, teacher: Tensor, weight: Tensor) -> tuple[float, Tensor]:
        """Mean KL(teacher || student) in nats over rows [n, H] with weights [n], and a scalar that has its gradient.

        The gradient for the logits is the difference of the probabilities; so no graph over the vocabulary is kept.
        """
        gradient, total = torch.empty_like(student), 0.0
        ours, theirs = student.detach().to(torch.bfloat16), teacher.to(torch.bfloat16)
        with torch.no_grad():
            for start in range(0, len(student), _CHUNK):
                rows = slice(start, start + _CHUNK)
                each, difference = self._divergence(
                    F.linear(ours[rows], self._head), F.linear(theirs[rows], self._head)
                )
                gradient[rows] = F.linear(difference, self._head_t).float() * weight[rows, None]
                total += float((each * weight[rows]).sum())
        count = float(weight.sum())
        return total / count, (student * (gradient / count)).sum()

    def logits(self, states: Tensor) -> Tensor:
        """Final normed states [..., H] -> logits [..., V], from bf16."""
        return F.linear(states.to(torch.bfloat16), self._head).float()

    def plan(self) -> RefactorPlan:
        """The plan with what has been learned so far."""
        healed = range(self.first_split, self.config.num_hidden_layers)
        factors: dict[str, tuple[Tensor, Tensor]] = {}
        for i, name in enumerate(PRODUCTS):
            pairs = [self._in_dense_order(name, self.layers[layer], i) for layer in healed]
            factors[name] = rounded(torch.stack([a for a, _ in pairs])), rounded(torch.stack([b for _, b in pairs]))
        norms = {
            name: rounded(torch.stack([self.layers[layer].norms[i] for layer in healed]))
            for i, name in enumerate(NORMS)
        }
        layers = [
            LayerPlan(layer.permutation, *(t.detach().clone() for t in layer.router))
            for layer in self.layers
            if int(layer.num_active) < self.settings.num_experts
        ]
        healing = Healing(tuple(healed), factors, norms, rounded(self.norm))
        return replace(self._plan, layers=layers, healing=healing).rounded()

    def _in_dense_order(self, name: str, layer: StudentLayer, product: int) -> tuple[Tensor, Tensor]:
        a, b = (factor.detach() for factor in layer.factors[2 * product : 2 * product + 2])
        back = layer.permutation.argsort()
        if name == "gate_up":
            b = torch.cat([half[back] for half in b.chunk(2)])
        elif name == "down":
            a = a[:, back]
        return a, b

    def _run_dense(self, layer: StudentLayer, hidden: Tensor) -> Tensor:
        result: Tensor = self._dense_layer(
            hidden, layer.dense_norms, layer.weights, *self._angles(hidden.shape[1]), self._geometry
        )
        return result

    def _angles(self, length: int) -> tuple[Tensor, Tensor]:
        """cos and sin [1, T, 1, D], bf16."""
        cos, sin = (t[:length].to(torch.bfloat16)[None, :, None] for t in (self._rotary.cos, self._rotary.sin))
        return cos, sin


def _student_layer(
    dense: DenseLayer, layer_plan: LayerPlan | None, plan: RefactorPlan, rank: int, generator: torch.Generator
) -> StudentLayer:
    settings = plan.settings
    inner_size, hidden_size = dense.gate.shape
    if layer_plan is None:
        permutation = torch.arange(inner_size)
        router = [torch.zeros(settings.num_experts, hidden_size), torch.zeros(settings.num_experts)]
    else:
        permutation = layer_plan.permutation
        router = [layer_plan.router_weight.clone(), layer_plan.router_bias.clone()]
    weights = [
        torch.cat((dense.q, dense.k, dense.v)),
        dense.o,
        torch.cat((dense.gate[permutation], dense.up[permutation])),
        dense.down[:, permutation].contiguous(),
    ]
    factors = []
    for weight in weights:
        outputs, inputs = weight.shape
        factors += [torch.randn(rank, inputs, generator=generator) / inputs**0.5, torch.zeros(outputs, rank)]
    norms = [dense.input_norm.clone(), dense.post_norm.clone()]
    for tensor in (*router, *factors, *norms):
        tensor.requires_grad_()
    return StudentLayer(
        weights=[weight.to(torch.bfloat16) for weight in weights],
        dense_norms=[dense.input_norm, dense.post_norm],
        norms=norms,
        factors=factors,
        router=router,
        num_active=torch.tensor(settings.num_experts if layer_plan is None else settings.num_active),
        permutation=permutation,
    )
