"""A refactored checkpoint's forward pass written independently of the code under test, to be compared with it."""

from __future__ import annotations

import json
from pathlib import Path

import torch
import torch.nn.functional as F  # noqa: N812
from safetensors.torch import load_file
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, LlamaModel


class TwinFfn(torch.nn.Module):
    """Shared expert plus the experts chosen by the router, each with weight one."""

    def __init__(self, tensors: dict[str, Tensor], prefix: str, num_experts: int, num_active: int) -> None:
        super().__init__()
        self.tensors, self.prefix = tensors, prefix
        self.num_experts, self.num_active = num_experts, num_active
        self.pregated: Tensor | None = None  # logits [B, T, E] to route by instead of the layer's own

    def expert(self, x: Tensor, name: str) -> Tensor:
        gate, up, down = (self.tensors[f"{self.prefix}{name}.{p}_proj.weight"].float() for p in ("gate", "up", "down"))
        return (F.silu(x @ gate.T) * (x @ up.T)) @ down.T

    def forward(self, x: Tensor) -> Tensor:
        logits = self.pregated
        if logits is None:
            logits = x @ self.tensors[f"{self.prefix}router.weight"].T + self.tensors[f"{self.prefix}router.bias"]
        chosen = logits.argsort(-1, descending=True)[..., : self.num_active]
        out = self.expert(x, "shared_expert")
        for i in range(self.num_experts):
            out = out + (chosen == i).any(-1, keepdim=True) * self.expert(x, f"experts.{i}")
        return out


def load_tensors(path: Path) -> dict[str, Tensor]:
    tensors: dict[str, Tensor] = {}
    for file in sorted(path.glob("*.safetensors")):
        tensors |= load_file(file)
    return tensors


def load_twin(path: Path, *, num_active: int | None = None) -> LlamaForCausalLM:
    """transformers' Llama with every FFN replaced by a `TwinFfn` over the tensors written to `path`."""
    config = json.loads((path / "config.json").read_text())
    assert config["architectures"] == ["ForegateLlamaMoeForCausalLM"]
    assert config["model_type"] == "foregate_llama_moe"
    tensors = load_tensors(path)
    names = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads")
    names += ("head_dim", "vocab_size", "rms_norm_eps", "max_position_embeddings", "tie_word_embeddings")
    settings = {name: config[name] for name in names}
    model = LlamaForCausalLM(LlamaConfig(**settings, rope_parameters=config["rope_parameters"]))
    num_active = config["num_experts_per_tok"] if num_active is None else num_active
    for index, layer in enumerate(model.model.layers):
        if index in config["dense_layers"]:
            continue
        layer.mlp = TwinFfn(tensors, f"model.layers.{index}.mlp.", config["num_experts"], num_active)
    layers = {name: tensor for name, tensor in tensors.items() if not name.startswith("model.pregate.")}
    whole = tuple(f"model.layers.{index}.mlp." for index in config["dense_layers"])
    dense = {name: tensor.float() for name, tensor in layers.items() if ".mlp." not in name or name.startswith(whole)}
    if config["tie_word_embeddings"]:
        assert "lm_head.weight" not in dense
        dense["lm_head.weight"] = dense["model.embed_tokens.weight"]
    model.load_state_dict(dense)
    return model.eval()


class PregatedTwin:
    """The twin routed by its pre-gate, which is a Llama of transformers' over a projection of the embeddings."""

    def __init__(self, path: Path) -> None:
        config, tensors = json.loads((path / "config.json").read_text()), load_tensors(path)
        self.model = load_twin(path)
        spec, heads = config["pregate"], config["num_key_value_heads"]
        self.tensors = {
            name.removeprefix("model.pregate."): tensor
            for name, tensor in tensors.items()
            if name.startswith("model.pregate.")
        }
        self.eps = config["rms_norm_eps"]
        self.split = [i for i in range(config["num_hidden_layers"]) if i not in config["dense_layers"]]
        self.gate = LlamaModel(
            LlamaConfig(
                hidden_size=spec["hidden_size"],
                intermediate_size=spec["intermediate_size"],
                num_hidden_layers=spec["num_layers"],
                num_attention_heads=heads,
                num_key_value_heads=heads,
                head_dim=config["head_dim"],
                vocab_size=1,
                rms_norm_eps=self.eps,
                rope_parameters=config["rope_parameters"],
            )
        ).eval()
        state = {name: tensor for name, tensor in self.tensors.items() if name.startswith(("layers.", "norm."))}
        missing, unexpected = self.gate.load_state_dict(state, strict=False)
        assert missing == ["embed_tokens.weight"]
        assert not unexpected

    @torch.inference_mode()
    def routes(self, token_ids: list[int]) -> Tensor:
        """Router logits [L, T, E] of the layers that are split."""
        embedded = self.model.model.embed_tokens(torch.tensor([token_ids]))
        normed = embedded * torch.rsqrt(embedded.square().mean(-1, keepdim=True) + self.eps)
        state = self.gate(inputs_embeds=normed @ self.tensors["input.weight"].T).last_hidden_state[0]
        return torch.stack(
            [state @ self.tensors[f"routers.{i}.weight"].T + self.tensors[f"routers.{i}.bias"] for i in self.split]
        )

    @torch.inference_mode()
    def logits(self, token_ids: list[int]) -> Tensor:
        """[T, V] of every position."""
        for i, routes in zip(self.split, self.routes(token_ids), strict=True):
            self.model.model.layers[i].mlp.pregated = routes[None]
        return self.model(torch.tensor([token_ids]), use_cache=False).logits[0]

    def greedy(self, token_ids: list[int], num_tokens: int) -> list[int]:
        """Greedy continuation, everything computed anew for each token."""
        tokens = list(token_ids)
        for _ in range(num_tokens):
            tokens.append(int(self.logits(tokens)[-1].argmax()))
        return tokens[len(token_ids) :]
