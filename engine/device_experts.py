"""The experts' side of a model on a device: slots in its memory, pinned host memory below, disk below that."""

from __future__ import annotations

import logging
import threading

from cache.device import open_device
from cache.device.device import Device, DeviceOutOfMemory, DeviceUnavailable
from cache.device_pool import DevicePool
from cache.device_source import DeviceSource
from cache.expert_cache import ExpertCache
from cache.expert_store import ExpertStore
from cache.pinned_tier import PinnedTier
from cache.transfer import TransferEngine
from cache.transfer_queue import TOGETHER_NBYTES
from engine.config import CacheConfig, format_nbytes
from engine.errors import ConfigError
from engine.free_memory import free_memory_nbytes
from engine.layers.cpu_experts import CpuExperts
from engine.layers.moe import ExpertArena
from kernels.backend import Backend
from kernels.quant.layout import RecordLayout

_log = logging.getLogger(__name__)

_SPARE_SHARE = 0.1  # of the device, for activations and what compiled kernels take
_PINNED_SHARE = 0.6  # of free host memory, where nobody says how much a GPU's tier below may take


def open_named(name: str) -> Device | None:
    """The device of that name; None is the CPU, which needs none. Raises `ConfigError`."""
    if name == "cpu":
        return None
    try:
        return open_device(name)
    except (ValueError, DeviceUnavailable) as error:
        raise ConfigError(str(error)) from error


class DeviceExperts(ExpertArena):
    """As `ExpertArena`, whose slots are on a device."""

    def __init__(
        self, device: Device, store: ExpertStore, layout: RecordLayout, num_slots: int, config: CacheConfig
    ) -> None:
        """Raises `ConfigError` if the device or pinned memory has no room."""
        num_passing = config.num_io_threads * max(1, TOGETHER_NBYTES // layout.nbytes)  # at most, on their way up
        num_kept = min(_pinned_nbytes(config, device) // layout.nbytes, len(store))
        try:
            self.pool = DevicePool(device, num_slots, layout.nbytes)
            self.tier = PinnedTier(
                store, max(num_passing, num_kept), device.pinned, exclusive=config.exclusive_tiers and num_kept > 0
            )
        except DeviceOutOfMemory as error:
            raise ConfigError(
                f"{num_slots} experts of {format_nbytes(layout.nbytes)} do not fit: {error}; lower --expert-memory"
            ) from error
        transfer = TransferEngine(
            DeviceSource(device, self.tier), config.num_io_threads, link_bandwidth=config.link_bandwidth
        )
        cache = ExpertCache(store, self.pool, config.policy, host=self.tier, transfer=transfer)
        super().__init__(cache, self.pool.memory.tensor(), num_slots, layout)
        _log.info(
            "%d experts (%s) on %s, %s of pinned host memory below",
            num_slots,
            format_nbytes(num_slots * layout.nbytes),
            device.name,
            format_nbytes(self.tier.num_slots * layout.nbytes),
        )

    def share_with_cpu(self, backend: Backend, lock: threading.Lock | None = None) -> None:
        """Missing experts may be computed by this backend of the CPU; see `CpuExperts`."""
        self.on_cpu = CpuExperts(self.cache, self.tier, backend, self.records.layout, lock)


def _pinned_nbytes(config: CacheConfig, device: Device) -> int:
    """Of the records that host memory keeps: as configured, else what a GPU's host has to spare."""
    if config.host_memory_nbytes is not None or device.tensors_on == "cpu":
        return config.host_memory_nbytes or 0
    return int(free_memory_nbytes() * _PINNED_SHARE)


def device_room(device: Device, kv_nbytes: int, dense_nbytes: int) -> int:
    """Bytes that experts may take of what is free beside keys and values and the other weights.

    Of a simulated device these lie in host memory, and count all the same.
    """
    free, _ = device.memory()
    return max(0, int((free - kv_nbytes - dense_nbytes) * (1 - _SPARE_SHARE)))
