"""Checkpoint -> a model that runs: dense weights in memory, experts behind the cache."""

from __future__ import annotations

import logging
from collections.abc import Mapping

import torch
from torch import Tensor

from cache.device.device import Device
from cache.expert_cache import ExpertCache
from cache.expert_key import ExpertKey
from cache.expert_store import ExpertStore
from cache.host_tier import HostTier
from cache.native.library import is_built
from cache.native_transfer import NativeTransfer
from cache.slot_pool import SlotPool
from engine.checkpoint import Checkpoint
from engine.config import CacheConfig, format_nbytes
from engine.convert import Progress, ensure_packed, expert_layout
from engine.device_experts import DeviceExperts
from engine.errors import ConfigError
from engine.expert_group import ExpertGroup
from engine.layers.foresight import RoutingObserver
from engine.layers.moe import ExpertArena, LayerwiseRouter, MoELayer, PregatedRouter, Router
from engine.layers.rotary import rotary_tables
from engine.models.decoder import Decoder, DecoderLayer, DenseFeedForward, FeedForward, Pregate
from engine.models.spec import ModelSpec, MoeSpec, PregateSpec
from kernels.backend import AttentionKernel, AttentionShape, Backend, Linear, MlpKernel, RouterKernel

_log = logging.getLogger(__name__)

DENSE_FORMATS = {"float32": "float32", "bfloat16": "bf16", "int8": "int8", "int4": "int8"}
ATTENTION_FORMATS = DENSE_FORMATS | {"int4": "int4"}  # LM heads and MLPs of all tokens lose too much in four bits


def kv_dtype(dtype: str) -> torch.dtype:
    """What keys and values are kept in beside dense weights of that dtype."""
    return torch.float32 if dtype == "float32" else torch.bfloat16


def load_decoder(
    checkpoint: Checkpoint,
    spec: ModelSpec,
    dtype: str,
    max_positions: int,
    backend: Backend,
    experts: ExpertArena | None,
    progress: Progress | None = None,
    *,
    observer: RoutingObserver | None = None,
) -> Decoder:
    """Read all dense weights and pack them as `dtype`; norms, routers and pre-gate stay float32.

    `spec`: the checkpoint's, with the routers that are wanted. Raises `CheckpointError` for what is missing.
    """
    loader = _DenseLoader(checkpoint, spec, dtype, max_positions, backend, observer)
    layers = []
    for layer in range(spec.num_layers):
        layers.append(loader.layer(layer, experts))
        if progress is not None:
            progress("loading dense weights", layer + 1, spec.num_layers)
    embedding = loader.tensor("model.embed_tokens.weight", spec.vocab_size, spec.hidden_size)
    tied = spec.tie_word_embeddings or "lm_head.weight" not in checkpoint
    head = embedding if tied else loader.tensor("lm_head.weight", spec.vocab_size, spec.hidden_size)
    norm = loader.tensor("model.norm.weight", spec.hidden_size)
    lm_head = backend.make_linear(head, None, DENSE_FORMATS[dtype])
    pregate = None if spec.pregate is None else loader.pregate(spec.pregate)
    checkpoint.close()
    embedding = (embedding if dtype == "float32" else embedding.to(torch.bfloat16)).to(backend.device)
    return Decoder(backend, embedding, layers, norm.to(backend.device), lm_head, spec.rms_norm_eps, pregate, observer)


class _DenseLoader:
    def __init__(
        self,
        checkpoint: Checkpoint,
        spec: ModelSpec,
        dtype: str,
        max_positions: int,
        backend: Backend,
        observer: RoutingObserver | None,
    ) -> None:
        self._checkpoint = checkpoint
        self._dtype = dtype
        self._backend = backend
        self._spec = spec
        self._observer = observer
        self._rotary = rotary_tables(self._spec.rope, self._spec.head_dim, max_positions)

    def tensor(self, name: str, *shape: int) -> Tensor:
        return self._checkpoint.tensor(name, shape, torch.float32)

    def layer(self, layer: int, experts: ExpertArena | None) -> DecoderLayer:
        spec, prefix = self._spec, f"model.layers.{layer}"
        moe = spec.moe
        input_norm = self.tensor(f"{prefix}.input_layernorm.weight", spec.hidden_size)
        shape, bias = self._attention_shape(f"{prefix}.self_attn"), spec.attention_bias
        attention = self._attention(f"{prefix}.self_attn", input_norm, shape, ATTENTION_FORMATS, bias=bias)
        norm = self.tensor(f"{prefix}.post_attention_layernorm.weight", spec.hidden_size)
        feed_forward: FeedForward
        if moe is not None and layer in moe.layers:
            assert experts is not None
            feed_forward = self._moe(layer, moe, norm, experts)
        else:
            feed_forward = DenseFeedForward(
                self._model_mlp(spec.dense_mlp.format(layer=layer), "intermediate_size", norm)
            )
        return DecoderLayer(attention, feed_forward)

    def pregate(self, spec: PregateSpec) -> Pregate:
        prefix, eps, plain = "model.pregate", self._spec.rms_norm_eps, {self._dtype: "float32"}
        layers = []
        for i in range(spec.num_layers):
            norms = [
                self.tensor(f"{prefix}.layers.{i}.{name}.weight", spec.hidden_size)
                for name in ("input_layernorm", "post_attention_layernorm")
            ]
            heads, head_dim = self._spec.num_kv_heads, self._spec.head_dim
            shape = AttentionShape(heads, heads, head_dim, "none", eps, None, None, None, *self._rotary)
            attention = self._attention(f"{prefix}.layers.{i}.self_attn", norms[0], shape, plain)
            mlp = self._mlp(f"{prefix}.layers.{i}.mlp", spec.intermediate_size, norms[1], spec.hidden_size, plain)
            layers.append(DecoderLayer(attention, DenseFeedForward(mlp)))
        inward = self._linear([(f"{prefix}.input", spec.hidden_size)], self._spec.hidden_size, plain)
        norm = self.tensor(f"{prefix}.norm.weight", spec.hidden_size)
        moe = self._spec.moe
        assert moe is not None
        routers = [self._router(f"{prefix}.routers.{layer}", moe, norm, bias=True) for layer in moe.layers]
        ones = torch.ones(self._spec.hidden_size, device=self._backend.device)
        return Pregate(self._backend, inward, ones, layers, routers, eps)

    def _linear(
        self, parts: list[tuple[str, int]], num_inputs: int, formats: Mapping[str, str], *, bias: bool = False
    ) -> Linear:
        """The named matrices below one another as one."""
        weight = torch.cat([self.tensor(f"{name}.weight", size, num_inputs) for name, size in parts])
        biases = torch.cat([self.tensor(f"{name}.bias", size) for name, size in parts]) if bias else None
        return self._backend.make_linear(weight, biases, formats[self._dtype])

    def _attention(
        self, prefix: str, norm: Tensor, shape: AttentionShape, formats: Mapping[str, str], *, bias: bool = False
    ) -> AttentionKernel:
        hidden_size = len(norm)
        q_size, kv_size = shape.num_heads * shape.head_dim, shape.num_kv_heads * shape.head_dim
        parts = [(f"{prefix}.q_proj", q_size), (f"{prefix}.k_proj", kv_size), (f"{prefix}.v_proj", kv_size)]
        qkv = self._linear(parts, hidden_size, formats, bias=bias)
        output = self._linear([(f"{prefix}.o_proj", hidden_size)], q_size, formats, bias=bias)
        return self._backend.make_attention(shape, norm, qkv, output)

    def _attention_shape(self, prefix: str) -> AttentionShape:
        spec = self._spec
        q_size, kv_size = spec.num_heads * spec.head_dim, spec.num_kv_heads * spec.head_dim
        norm_sizes = {"none": None, "head": (spec.head_dim, spec.head_dim), "full": (q_size, kv_size)}[spec.qk_norm]
        return AttentionShape(
            num_heads=spec.num_heads,
            num_kv_heads=spec.num_kv_heads,
            head_dim=spec.head_dim,
            qk_norm=spec.qk_norm,
            eps=spec.rms_norm_eps,
            clip=spec.clip_qkv,
            q_norm=self.tensor(f"{prefix}.q_norm.weight", norm_sizes[0]) if norm_sizes else None,
            k_norm=self.tensor(f"{prefix}.k_norm.weight", norm_sizes[1]) if norm_sizes else None,
            cos=self._rotary[0],
            sin=self._rotary[1],
        )

    def _mlp(
        self, prefix: str, size: int, norm: Tensor | None, hidden_size: int, formats: Mapping[str, str]
    ) -> MlpKernel:
        parts = [(f"{prefix}.gate_proj", size), (f"{prefix}.up_proj", size)]
        gate_up = self._linear(parts, hidden_size, formats)
        down = self._linear([(f"{prefix}.down_proj", hidden_size)], size, formats)
        return self._backend.make_mlp(norm, self._spec.rms_norm_eps, gate_up, down)

    def _model_mlp(self, prefix: str, size_field: str, norm: Tensor | None) -> MlpKernel:
        size = int(self._checkpoint.config[size_field])
        return self._mlp(prefix, size, norm, self._spec.hidden_size, DENSE_FORMATS)

    def _moe(self, layer: int, moe: MoeSpec, norm: Tensor, experts: ExpertArena) -> MoELayer:
        shared = None
        if moe.shared_mlp is not None:
            shared = self._model_mlp(moe.shared_mlp.format(layer=layer), "shared_expert_intermediate_size", None)
        return MoELayer(
            moe.layers.index(layer),
            expert_keys(moe, layer),
            self._backend,
            self._layer_router(layer, moe, norm),
            experts,
            shared,
            self._observer,
        )

    def _layer_router(self, layer: int, moe: MoeSpec, norm: Tensor) -> Router:
        if self._spec.pregate is not None:
            return PregatedRouter(
                moe.layers.index(layer), self._backend, norm.to(self._backend.device), self._spec.rms_norm_eps
            )
        return LayerwiseRouter(self._router(moe.router.format(layer=layer), moe, norm, bias=moe.router_bias))

    def _router(self, name: str, moe: MoeSpec, norm: Tensor, *, bias: bool) -> RouterKernel:
        linear = self._linear([(name, moe.num_experts)], len(norm), {self._dtype: "float32"}, bias=bias)
        return self._backend.make_router(norm, self._spec.rms_norm_eps, linear, moe.num_active, moe.routing)


def expert_keys(moe: MoeSpec, layer: int) -> list[ExpertKey]:
    """Where a layer's experts are stored, in its router's order."""
    return [ExpertKey(layer, expert) for expert in range(moe.num_experts)]


def open_experts(
    checkpoint: Checkpoint,
    config: CacheConfig,
    available_nbytes: int,
    progress: Progress | None = None,
    *,
    device: Device | None = None,
    group: ExpertGroup | None = None,
) -> ExpertArena:
    """Pack the experts if that was not done before, and open them behind a cache of the configured budget.

    `available_nbytes` of memory may be taken if the configuration names no budget; of the `device`, if there is one.
    Of a `group` each rank has slots for its own experts, and an even share of what is available.
    Raises `ConfigError` if the budget cannot hold a single expert, `PackedFileError` if the packed file is damaged.
    """
    moe = checkpoint.spec.moe
    assert moe is not None
    layout = expert_layout(checkpoint, config.format)
    num_experts = len(moe.layers) * moe.num_experts if group is None else group.num_owned
    available_nbytes //= 1 if group is None else group.size
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
    try:
        if device is not None:
            return DeviceExperts(device, store, layout, num_slots, config)
        pool = SlotPool(num_slots, layout.nbytes)
        cache = _open_cache(store, pool, config, _host_tier(store, config, num_experts))
    except ValueError as error:
        raise ConfigError(str(error)) from error
    return ExpertArena(cache, torch.frombuffer(pool.arena, dtype=torch.uint8), num_slots, layout, group)


def _open_cache(store: ExpertStore, pool: SlotPool, config: CacheConfig, host: HostTier | None) -> ExpertCache:
    """Read natively, unless records come through the host tier, which is not, or the library was not built."""
    if host is None and is_built():
        native = NativeTransfer(store, config.num_io_threads, link_bandwidth=config.link_bandwidth)
        return ExpertCache(store, pool, config.policy, transfer=native, arrival=native.arrival)
    if host is None:
        _log.warning("the native transfer was not built: experts are read by Python threads, which is slower")
    return ExpertCache(
        store,
        pool,
        config.policy,
        host=host,
        num_io_threads=config.num_io_threads,
        link_bandwidth=config.link_bandwidth,
    )


def _host_tier(store: ExpertStore, config: CacheConfig, num_experts: int) -> HostTier | None:
    if config.host_memory_nbytes is None:
        return None
    num_slots = min(config.host_memory_nbytes // store.record_nbytes, num_experts)
    if num_slots < 1:
        raise ConfigError(
            f"host memory of {format_nbytes(config.host_memory_nbytes)} cannot hold one expert "
            f"({format_nbytes(store.record_nbytes)}); raise --host-memory or leave it out"
        )
    return HostTier(store, num_slots, exclusive=config.exclusive_tiers)
