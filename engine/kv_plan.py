"""How much KV memory holds."""

from __future__ import annotations

import logging

import torch

from engine.config import EngineConfig, format_nbytes
from engine.errors import ConfigError
from engine.kv_cache import BLOCK_SIZE, kv_block_nbytes
from engine.models.spec import ModelSpec

_log = logging.getLogger(__name__)


def plan_kv(config: EngineConfig, spec: ModelSpec, dtype: torch.dtype) -> tuple[int, int]:
    """-> number of KV blocks, and the max_model_len that they and the model allow. Raises `ConfigError`."""
    num_blocks = config.kv_memory_nbytes // kv_block_nbytes(spec, dtype)
    capacity = num_blocks * BLOCK_SIZE
    wanted = config.max_model_len
    if wanted is not None and wanted > spec.max_position_embeddings:
        raise ConfigError(
            f"max_model_len {wanted} is above the {spec.max_position_embeddings} positions that the model was made for"
        )
    limit = spec.max_position_embeddings if wanted is None else wanted
    if capacity < (limit if wanted is not None else BLOCK_SIZE):
        needed = -(-limit // BLOCK_SIZE) * kv_block_nbytes(spec, dtype)
        raise ConfigError(
            f"KV memory of {format_nbytes(config.kv_memory_nbytes)} holds {capacity} tokens, fewer than max_model_len "
            f"{limit}; raise --kv-memory to {format_nbytes(needed)} or lower --max-model-len"
        )
    if capacity < limit:
        _log.warning("KV memory holds %d tokens: max_model_len is %d instead of %d", capacity, capacity, limit)
    return num_blocks, min(limit, capacity)
