"""A dense source and a plan -> the MoE checkpoint directory. Every byte follows from the two; there when complete."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock
from safetensors.torch import save_file
from torch import Tensor

from engine.errors import CheckpointError, ConfigError
from engine.refactor.healing import healed
from engine.refactor.plan import RefactorPlan
from engine.refactor.source import DenseSource, fingerprint, write_json

ARCHITECTURE = "ForegateLlamaMoeForCausalLM"
MODEL_TYPE = "foregate_llama_moe"
DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}
MAX_SHARD_NBYTES = 5 * 10**9

Progress = Callable[[str, int, int], None]  # what is done, steps done, steps in all


def write_checkpoint(
    source: DenseSource,
    plan: RefactorPlan,
    out: Path,
    *,
    dtype: str = "bfloat16",
    progress: Progress = lambda what, done, total: None,
    replace: bool = False,
    max_shard_nbytes: int = MAX_SHARD_NBYTES,
) -> None:
    """Write the directory `out`: config.json, safetensors, tokenizer files.

    Raises `ConfigError` (unknown dtype), `CheckpointError` (the plan belongs to another model; `out` exists and
    `replace` is false).
    """
    if dtype not in DTYPES:
        raise ConfigError(f"unknown dtype {dtype!r}; known: {', '.join(sorted(DTYPES))}")
    plan.check(source.config)
    if fingerprint(source) != plan.source_sha256:
        raise CheckpointError(f"the plan was learned from another checkpoint than {source.path}; learn it anew")
    with staged_directory(out, replace=replace) as stage:
        shards = _ShardWriter(stage, max_shard_nbytes)
        for name, tensor in moe_tensors(source, plan, DTYPES[dtype], progress):
            shards.add(name, tensor)
        shards.finish()
        source.write_tokenizer(stage)
        write_json(stage / "config.json", moe_config(source, plan, dtype))


def moe_config(source: DenseSource, plan: RefactorPlan, dtype: str) -> dict[str, Any]:
    """config.json of the MoE: the Llama's fields, the split's sizes, and what it was made from."""
    settings = plan.settings
    pregate = {} if plan.pregate is None else {"pregate": asdict(plan.pregate.spec)}
    return (
        source.config.as_dict()
        | pregate
        | {
            "architectures": [ARCHITECTURE],
            "model_type": MODEL_TYPE,
            "shared_expert_intermediate_size": settings.shared_size,
            "moe_intermediate_size": settings.expert_size(source.config.intermediate_size),
            "num_experts": settings.num_experts,
            "num_experts_per_tok": settings.num_active,
            "dense_layers": list(settings.dense_layers),
            "torch_dtype": dtype,
            "foregate_refactor": {"plan_sha256": plan.sha256(), "source_sha256": plan.source_sha256},
        }
    )


def moe_tensors(
    source: DenseSource, plan: RefactorPlan, dtype: torch.dtype, progress: Progress = lambda what, done, total: None
) -> Iterator[tuple[str, Tensor]]:
    """Every tensor of the MoE in a fixed order, weights in `dtype` (round to nearest), routers in float32."""
    config, settings = source.config, plan.settings
    source = healed(source, plan.healing)
    expert_size = settings.expert_size(config.intermediate_size)
    yield "model.embed_tokens.weight", source.tensor("model.embed_tokens.weight").to(dtype)
    for index, layer in enumerate(plan.by_layer(config.num_hidden_layers)):
        prefix = f"model.layers.{index}."
        for name in ("input_layernorm", "post_attention_layernorm", *(f"self_attn.{p}_proj" for p in "qkvo")):
            yield f"{prefix}{name}.weight", source.tensor(f"{prefix}{name}.weight").to(dtype)
        gate, up, down = (source.tensor(f"{prefix}mlp.{p}_proj.weight").to(dtype) for p in ("gate", "up", "down"))
        if layer is None:
            for p, weight in (("gate", gate), ("up", up), ("down", down)):
                yield f"{prefix}mlp.{p}_proj.weight", weight
            progress("write", index + 1, config.num_hidden_layers)
            continue
        groups = layer.permutation.split([settings.shared_size] + [expert_size] * settings.num_experts)
        for i, neurons in enumerate(groups):
            owner = f"{prefix}mlp.experts.{i - 1}." if i else f"{prefix}mlp.shared_expert."
            yield f"{owner}gate_proj.weight", gate[neurons]
            yield f"{owner}up_proj.weight", up[neurons]
            yield f"{owner}down_proj.weight", down[:, neurons].contiguous()
        yield f"{prefix}mlp.router.weight", layer.router_weight.contiguous()
        yield f"{prefix}mlp.router.bias", layer.router_bias.contiguous()
        progress("write", index + 1, config.num_hidden_layers)
    yield "model.norm.weight", source.tensor("model.norm.weight").to(dtype)
    if not config.tie_word_embeddings:
        yield "lm_head.weight", source.tensor("lm_head.weight").to(dtype)
    if plan.pregate is not None:
        for name, tensor in sorted(plan.pregate.parameters.items()):
            yield f"model.pregate.{name}", tensor.float()


@contextmanager
def staged_directory(out: Path, *, replace: bool) -> Iterator[Path]:
    """A directory beside `out` that becomes `out` when the block ends well, and vanishes when it does not.

    The lock dies with its process, so whatever an earlier, killed one left behind is known to be stale and removed.
    """
    out.parent.mkdir(parents=True, exist_ok=True)
    stage, old = out.parent / f".{out.name}.partial", out.parent / f".{out.name}.old"
    with FileLock(out.parent / f".{out.name}.lock"):
        for stale in (stage, old):
            shutil.rmtree(stale, ignore_errors=True)
        if out.exists() and not replace:
            raise CheckpointError(f"{out} exists; remove it or choose another place")
        stage.mkdir()
        try:
            yield stage
            if out.exists():
                out.rename(old)
            stage.rename(out)
        finally:
            for stale in (stage, old):
                shutil.rmtree(stale, ignore_errors=True)


class _ShardWriter:
    """Collects tensors into files of at most `max_nbytes` (a larger tensor has its own); one file needs no index."""

    def __init__(self, directory: Path, max_nbytes: int) -> None:
        self._directory, self._max_nbytes = directory, max_nbytes
        self._tensors: dict[str, Tensor] = {}
        self._shards: list[list[str]] = []
        self._pending_nbytes = self._total_nbytes = 0

    def add(self, name: str, tensor: Tensor) -> None:
        if self._tensors and self._pending_nbytes + tensor.nbytes > self._max_nbytes:
            self._flush()
        self._tensors[name] = tensor
        self._pending_nbytes += tensor.nbytes
        self._total_nbytes += tensor.nbytes

    def finish(self) -> None:
        self._flush()
        if len(self._shards) == 1:
            self._path(0).rename(self._directory / "model.safetensors")
            return
        weight_map = {}
        for index, names in enumerate(self._shards):
            file = f"model-{index + 1:05d}-of-{len(self._shards):05d}.safetensors"
            self._path(index).rename(self._directory / file)
            weight_map.update(dict.fromkeys(names, file))
        index_content = {"metadata": {"total_size": self._total_nbytes}, "weight_map": weight_map}
        text = json.dumps(index_content, indent=2, sort_keys=True) + "\n"
        (self._directory / "model.safetensors.index.json").write_text(text, encoding="utf-8")

    def _path(self, index: int) -> Path:
        return self._directory / f"shard-{index}"

    def _flush(self) -> None:
        path = self._path(len(self._shards))
        save_file(self._tensors, path, metadata={"format": "pt"})
        path.chmod(0o644)  # safetensors creates it readable by its owner alone
        self._shards.append(list(self._tensors))
        self._tensors, self._pending_nbytes = {}, 0
