"""Checkpoint -> a model that runs: dense weights in memory, experts behind the cache."""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from cache.expert_cache import ExpertCache
from cache.expert_store import ExpertStore
from cache.slot_pool import SlotPool
from engine.checkpoint import Checkpoint
from engine.config import CacheConfig, format_nbytes
from engine.convert import Progress, ensure_packed, expert_layout
from engine.errors import ConfigError
from engine.layers.attention import Attention, AttentionWeights
from engine.layers.mlp import DenseMLP
from engine.layers.moe import ExpertArena, MoELayer, Route, make_arena
from engine.layers.rotary import RotaryEmbedding
from engine.models.decoder import Decoder, DecoderLayer
from engine.models.spec import MoeSpec
from kernels import reference

_log = logging.getLogger(__name__)

ROUTES: dict[str, Callable[..., tuple[Tensor, Tensor]]] = {
    "softmax": partial(reference.route_softmax, renormalise=False),
    "softmax_renormalised": partial(reference.route_softmax, renormalise=True),
    "unweighted": reference.route_unweighted,
}


def load_decoder(
    checkpoint: Checkpoint,
    dtype: torch.dtype,
    max_positions: int,
    experts: ExpertArena | None,
    progress: Progress | None = None,
) -> Decoder:
    """Read all dense weights as `dtype`; routers stay float32. Raises `CheckpointError` for what is missing."""
    loader = _DenseLoader(checkpoint, dtype)
    spec = checkpoint.spec
    layers = []
    for layer in range(spec.num_layers):
        layers.append(loader.layer(layer, experts))
        if progress is not None:
            progress("loading dense weights", layer + 1, spec.num_layers)
    embedding = loader.tensor("model.embed_tokens.weight", spec.vocab_size, spec.hidden_size)
    tied = spec.tie_word_embeddings or "lm_head.weight" not in checkpoint
    lm_head = embedding if tied else loader.tensor("lm_head.weight", spec.vocab_size, spec.hidden_size)
    norm = loader.tensor("model.norm.weight", spec.hidden_size)
    checkpoint.close()
    rotary = RotaryEmbedding(spec.rope, spec.head_dim, max_positions, torch.device("cpu"))
    return Decoder(spec, embedding, layers, norm, lm_head, rotary)


class _DenseLoader:
    def __init__(self, checkpoint: Checkpoint, dtype: torch.dtype) -> None:
        self._checkpoint = checkpoint
        self._dtype = dtype
        self._spec = checkpoint.spec

    def tensor(self, name: str, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        return self._checkpoint.tensor(name, shape, dtype or self._dtype)

    def layer(self, layer: int, experts: ExpertArena | None) -> DecoderLayer:
        spec, prefix = self._spec, f"model.layers.{layer}"
        moe = spec.moe
        feed_forward: MoELayer | DenseMLP
        if moe is not None and layer in moe.layers:
            assert experts is not None
            feed_forward = self._moe(layer, moe, experts)
        else:
            feed_forward = self._mlp(spec.dense_mlp.format(layer=layer))
        return DecoderLayer(
            attention_norm=self.tensor(f"{prefix}.input_layernorm.weight", spec.hidden_size),
            attention=self._attention(f"{prefix}.self_attn"),
            feed_forward_norm=self.tensor(f"{prefix}.post_attention_layernorm.weight", spec.hidden_size),
            feed_forward=feed_forward,
        )

    def _attention(self, prefix: str) -> Attention:
        spec = self._spec
        q_size, kv_size = spec.num_heads * spec.head_dim, spec.num_kv_heads * spec.head_dim
        parts = (("q_proj", q_size), ("k_proj", kv_size), ("v_proj", kv_size))
        bias = spec.attention_bias
        norm_sizes = {"none": None, "head": (spec.head_dim, spec.head_dim), "full": (q_size, kv_size)}[spec.qk_norm]
        weights = AttentionWeights(
            qkv=torch.cat([self.tensor(f"{prefix}.{name}.weight", size, spec.hidden_size) for name, size in parts]),
            qkv_bias=torch.cat([self.tensor(f"{prefix}.{name}.bias", size) for name, size in parts]) if bias else None,
            o=self.tensor(f"{prefix}.o_proj.weight", spec.hidden_size, q_size),
            o_bias=self.tensor(f"{prefix}.o_proj.bias", spec.hidden_size) if bias else None,
            q_norm=self.tensor(f"{prefix}.q_norm.weight", norm_sizes[0]) if norm_sizes else None,
            k_norm=self.tensor(f"{prefix}.k_norm.weight", norm_sizes[1]) if norm_sizes else None,
        )
        return Attention(spec, weights)

    def _mlp(self, prefix: str) -> DenseMLP:
        field = "intermediate_size" if self._spec.moe is None or "shared" not in prefix else _SHARED_SIZE
        size, hidden_size = int(self._checkpoint.config[field]), self._spec.hidden_size
        return DenseMLP(
            gate=self.tensor(f"{prefix}.gate_proj.weight", size, hidden_size),
            up=self.tensor(f"{prefix}.up_proj.weight", size, hidden_size),
            down=self.tensor(f"{prefix}.down_proj.weight", hidden_size, size),
        )

    def _moe(self, layer: int, moe: MoeSpec, experts: ExpertArena) -> MoELayer:
        router = moe.router.format(layer=layer)
        shape = (moe.num_experts, self._spec.hidden_size)
        bias = self.tensor(f"{router}.bias", moe.num_experts, dtype=torch.float32) if moe.router_bias else None
        route: Route = partial(ROUTES[moe.routing], num_active=moe.num_active)
        shared = None if moe.shared_mlp is None else self._mlp(moe.shared_mlp.format(layer=layer))
        # the router sees activations rounded to the dense dtype, and is itself computed in float32
        weight = self.tensor(f"{router}.weight", *shape, dtype=torch.float32)
        return MoELayer(layer, weight, bias, route, experts, shared)


_SHARED_SIZE = "shared_expert_intermediate_size"


def open_experts(
    checkpoint: Checkpoint, config: CacheConfig, available_nbytes: int, progress: Progress | None = None
) -> ExpertArena:
    """Pack the experts if that was not done before, and open them behind a cache of the configured budget.

    `available_nbytes` of memory may be taken if the configuration names no budget. Raises `ConfigError` if the
    budget cannot hold a single expert, `PackedFileError` if the packed file is damaged.
    """
    moe = checkpoint.spec.moe
    assert moe is not None
    quant_format, layout = expert_layout(checkpoint, config.format)
    num_experts = len(moe.layers) * moe.num_experts
    budget = config.memory_nbytes if config.memory_nbytes is not None else available_nbytes
    num_slots = min(budget // layout.nbytes, num_experts)
    if num_slots < 1:
        raise ConfigError(
            f"expert memory of {format_nbytes(budget)} cannot hold one {config.format} expert "
            f"({format_nbytes(layout.nbytes)}); raise --expert-memory or choose a smaller format with --experts"
        )
    per_token = len(moe.layers) * moe.num_active
    if num_slots < min(per_token, num_experts):
        _log.warning(
            "expert cache of %d slots is below one token's %d experts: with %s most of them are read again for every "
            "token; %s would hold one token's, %s all",
            num_slots,
            per_token,
            config.policy,
            format_nbytes(per_token * layout.nbytes),
            format_nbytes(num_experts * layout.nbytes),
        )
    store = ExpertStore(ensure_packed(checkpoint, config.format, config.packed_dir, progress))
    pool = SlotPool(num_slots, layout.nbytes)
    try:
        cache = ExpertCache(store, pool, config.policy, num_io_threads=config.num_io_threads)
    except ValueError as error:
        raise ConfigError(str(error)) from error
    return ExpertArena(cache, make_arena(memoryview(pool.arena), num_slots), quant_format, layout)


def free_memory_nbytes() -> int:
    """Memory that can be taken without swapping, as the system estimates it, within a cgroup's limit if any."""
    available = 0
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("MemAvailable:"):
            available = int(line.split()[1]) * 1024
    limit, used = Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory.current")
    if limit.exists() and used.exists() and (text := limit.read_text().strip()) != "max":
        available = min(available, max(0, int(text) - int(used.read_text())))
    return available
