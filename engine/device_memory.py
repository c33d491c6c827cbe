"""Measures a device and settles how much of its memory keys and values get, where nobody says."""

from __future__ import annotations

import logging
import statistics
import time
from collections.abc import Callable
from dataclasses import replace

from cache.device.device import Device, Region
from engine.checkpoint import Checkpoint
from engine.config import EngineConfig, format_nbytes
from engine.convert import expert_layout
from engine.device_experts import device_room
from engine.errors import ConfigError
from engine.footprint import dense_nbytes, kv_token_nbytes, streamed_nbytes
from engine.hit_rate import expected_hit_rate
from engine.memory_split import Need, Rates, split_memory

_log = logging.getLogger(__name__)

_PROBE_NBYTES = 64 * 1024**2
_NUM_PROBES = 5
_CONTEXT = 2048  # tokens that a request is taken to have on average, if the model allows twice as many
_LONGEST = 4096  # that must fit, where nobody says how long a request may be


def measure_rates(device: Device) -> Rates:
    """By some copies up, and within its memory. Takes a few milliseconds on a GPU, and some of its memory meanwhile."""
    nbytes = min(_PROBE_NBYTES, device.memory()[0] // 4)
    arena, memory, stream = device.allocate(nbytes), device.pinned(nbytes), device.stream("probe")
    half = nbytes // 2

    def rate(nbytes: int, begin: Callable[[], object], wait: Callable[[], object]) -> float:
        times = []
        for _ in range(_NUM_PROBES):
            began = time.perf_counter()
            begin()
            wait()
            times.append(time.perf_counter() - began)
        return nbytes / statistics.median(times)

    def within() -> None:
        device.compute.run(lambda: arena.tensor()[:half].copy_(arena.tensor()[half : 2 * half]))

    try:
        link = rate(nbytes, lambda: stream.copy_in(Region(arena, 0, nbytes), memory), stream.synchronize)
        return Rates(link=link, memory=rate(2 * half, within, device.compute.synchronize))
    finally:
        arena.free()


def with_shared_memory(
    config: EngineConfig, checkpoint: Checkpoint, device: Device | None, rates: Rates | None = None
) -> EngineConfig:
    """With as much for keys and values as serves the most tokens; as it is if that is settled, or there is no device.

    Raises `ConfigError` if the device cannot hold a request and an expert.
    """
    spec, moe = checkpoint.spec, checkpoint.spec.moe
    if device is None or moe is None or not config.share_memory or config.cache.memory_nbytes is not None:
        return config
    limit = config.max_model_len or min(spec.max_position_embeddings, _LONGEST)
    need = Need(
        record_nbytes=expert_layout(checkpoint, config.cache.format).nbytes,
        num_layers=len(moe.layers),
        num_experts=moe.num_experts,
        num_active=moe.num_active,
        dense_nbytes=streamed_nbytes(checkpoint, config.dtype),
        kv_token_nbytes=kv_token_nbytes(checkpoint, config.dtype),
        context=max(1, min(_CONTEXT, limit // 2)),
        longest=limit,
        max_seqs=config.scheduler.max_num_seqs,
    )
    num_experts, per_token = need.num_layers * need.num_experts, need.num_layers * need.num_active
    room = device_room(device, 0, dense_nbytes(checkpoint, config.dtype))
    split = split_memory(
        room,
        need,
        rates or measure_rates(device),
        lambda num_slots: expected_hit_rate(num_slots, num_experts, per_token),
    )
    if split is None:
        raise ConfigError(
            f"{format_nbytes(room)} of {device.name} cannot hold a request of {limit} tokens and an expert; lower "
            "--max-model-len or choose smaller formats with --dtype and --experts"
        )
    kv_size = format_nbytes(split.kv_nbytes)
    _log.info("keys and values get %s, for %d requests at once, experts the rest", kv_size, split.num_seqs)
    block = int(16 * need.kv_token_nbytes)
    return replace(config, kv_memory_nbytes=-(-split.kv_nbytes // block) * block)
