"""What an engine consists of, put together once from its configuration; knows no requests and takes no steps."""

from __future__ import annotations

import os
import secrets
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from cache.device.device import Device
from engine.block_manager import BlockManager
from engine.checkpoint import Checkpoint
from engine.config import EngineConfig
from engine.constraints import Constraints
from engine.convert import Progress
from engine.device_backend import backend_for, on_device
from engine.device_experts import device_room, open_named
from engine.device_memory import with_shared_memory
from engine.errors import ConfigError
from engine.expert_group import ExpertGroup
from engine.footprint import dense_nbytes, room_for_experts
from engine.foresight import make_foresight
from engine.free_memory import free_memory_nbytes
from engine.kv_cache import BLOCK_SIZE, KVCache
from engine.kv_plan import plan_kv
from engine.layers.foresight import Observers, RoutingObserver
from engine.layers.moe import ExpertArena
from engine.live_experts import LiveExperts
from engine.loader import expert_keys, kv_dtype, load_decoder, open_experts
from engine.messages import ModelInfo
from engine.model_runner import ModelRunner
from engine.models.spec import ModelSpec
from engine.recordings import Recordings
from engine.scheduler import FcfsScheduler
from engine.schedulers import SCHEDULERS
from engine.tokenizer import TokenDecoder, Tokenizer
from kernels.backend import Backend, Choose, make_choose


@dataclass(frozen=True, slots=True)
class Assembly:
    """The parts of one engine. `None` are those that its model or configuration does without."""

    config: EngineConfig  # resolved
    spec: ModelSpec
    info: ModelInfo
    tokenizer: TokenDecoder
    eos_token_ids: frozenset[int]
    device: Device | None
    group: ExpertGroup | None
    experts: ExpertArena | None
    live: LiveExperts | None
    observers: Observers
    recordings: Recordings
    runner: ModelRunner
    blocks: BlockManager
    scheduler: FcfsScheduler
    constraints: Constraints
    choose: Choose
    next_seed: Callable[[], int]  # 63 bits, for a request that brings none


def assemble(
    config: EngineConfig,
    progress: Progress | None,
    *,
    checkpoint: Checkpoint | None,
    tokenizer: TokenDecoder | None,
    backend: Backend | None,
    observer: RoutingObserver | None,
    device: Device | None,
    rank: int,
    meeting: Path | None,
) -> Assembly:
    """See `Engine`, for what stands in for what, and what is raised."""
    if config.expert_parallel > 1 and checkpoint is not None:
        raise ConfigError("the processes of --expert-parallel load a checkpoint from its directory")
    checkpoint = checkpoint or Checkpoint(config.model)
    spec = checkpoint.spec.with_router(config.router)
    config = config.resolved(spec.moe is not None)
    if config.scheduler.policy not in SCHEDULERS:
        raise ConfigError(f"unknown scheduler {config.scheduler.policy!r}; known: {', '.join(SCHEDULERS)}")
    num_threads = config.num_threads or len(os.sched_getaffinity(0))
    torch.set_num_threads(num_threads)
    device = device or open_named(config.device)
    backend = backend or backend_for(config, device, num_threads)
    config = with_shared_memory(config, checkpoint, device)
    dtype = kv_dtype(config.dtype)
    num_blocks, max_model_len = plan_kv(config, spec, dtype)
    tokenizer = tokenizer or Tokenizer(config.model)
    available = _room(checkpoint, config, device)
    group = ExpertGroup(config, spec.moe, rank) if config.expert_parallel > 1 else None
    if group is not None and meeting is not None:
        group.join(meeting)
    experts: ExpertArena | None = None
    if spec.moe is not None:
        experts = open_experts(checkpoint, config.cache, available, progress, device=device, group=group)
    if group is not None and meeting is None:
        group.lead()  # now that the packed experts are there
    backend, waiter = on_device(config, backend, device, experts, num_threads)
    foresight = None if group is not None else make_foresight(config, spec, experts, checkpoint, backend)
    live = None if config.scheduler.policy == "fcfs" else _live_experts(spec, experts)
    observers = Observers([one for one in (waiter, foresight, live, observer) if one is not None])
    recordings = Recordings(config.record_trace, spec.moe, observers)
    try:
        model = load_decoder(
            checkpoint, spec, config.dtype, max_model_len, backend, experts, progress, observer=observers
        )
        kv_cache = KVCache(spec, num_blocks, dtype, backend.device)
    except torch.OutOfMemoryError as error:
        raise ConfigError(
            f"the device has no room beside its experts: {error}; lower --expert-memory or --kv-memory"
        ) from error
    blocks = BlockManager(num_blocks, BLOCK_SIZE)
    eos_token_ids = frozenset(checkpoint.eos_token_ids() or _as_ids(tokenizer.eos_token_id))
    assembly = Assembly(
        config=config,
        spec=spec,
        info=ModelInfo(
            name=config.served_name or config.model.resolve().name,
            model_type=checkpoint.model_type,
            max_model_len=max_model_len,
            vocab_size=spec.vocab_size,
            has_chat_template=tokenizer.has_chat_template,
            chat_template=tokenizer.template_text,
            template_variables=tokenizer.template_variables,
            added_tokens=tokenizer.added_tokens,
            eos_token_ids=tuple(sorted(eos_token_ids)),
            dtype=config.dtype,
            expert_format=config.cache.format if experts is not None else None,
        ),
        tokenizer=tokenizer,
        eos_token_ids=eos_token_ids,
        device=device,
        group=group,
        experts=experts,
        live=live,
        observers=observers,
        recordings=recordings,
        runner=ModelRunner(model, kv_cache, group),
        blocks=blocks,
        scheduler=SCHEDULERS[config.scheduler.policy](config.scheduler, blocks, live, time.perf_counter),
        constraints=Constraints(tokenizer.to_json, spec.vocab_size, sorted(eos_token_ids), num_threads),
        choose=make_choose(backend, num_threads),
        next_seed=_seeds(config.seed),
    )
    if group is not None:
        group.loaded()
    return assembly


def _room(checkpoint: Checkpoint, config: EngineConfig, device: Device | None) -> int:
    """Bytes that experts may take, of memory or of the device."""
    dense = dense_nbytes(checkpoint, config.dtype)
    if device is None:
        return room_for_experts(free_memory_nbytes(), config.kv_memory_nbytes, dense)
    return device_room(device, config.kv_memory_nbytes, dense)


def _live_experts(spec: ModelSpec, experts: ExpertArena | None) -> LiveExperts | None:
    if experts is None or (moe := spec.moe) is None:
        return None
    return LiveExperts(experts.cache, [expert_keys(moe, layer) for layer in moe.layers], moe.num_active)


def _seeds(seed: int | None) -> Callable[[], int]:
    """Reproducible from the configured one, if there is one."""
    if seed is None:
        return lambda: secrets.randbits(63)
    generator = torch.Generator().manual_seed(seed)
    return lambda: int(torch.randint(0, 2**63 - 1, (), generator=generator, dtype=torch.int64))


def _as_ids(token_id: int | None) -> tuple[int, ...]:
    return () if token_id is None else (token_id,)
