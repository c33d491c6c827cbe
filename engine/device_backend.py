"""Which kernels compute where: on the CPU, on a GPU that runs what is called, or on a stream that has to be told."""

from __future__ import annotations

from cache.device.device import Device
from engine.config import EngineConfig
from engine.device_experts import DeviceExperts
from engine.errors import ConfigError
from engine.layers.foresight import RoutingObserver
from engine.layers.moe import ExpertArena
from engine.stream_backend import StepEnd, StreamBackend
from kernels.backend import Backend, choose_backend

_OF_A_GPU = "triton"


def backend_for(config: EngineConfig, device: Device | None, num_threads: int) -> Backend:
    """The configured kernels; `auto` are a GPU's own on a GPU. Raises `ConfigError` for what cannot compute there."""
    is_gpu = device is not None and device.tensors_on != "cpu"
    name = _OF_A_GPU if is_gpu and config.kernels == "auto" else config.kernels
    try:
        backend = choose_backend(name, num_threads)
    except (ValueError, RuntimeError) as error:
        raise ConfigError(str(error)) from error
    where = device.tensors_on if device is not None else "cpu"
    if backend.device.type != where:
        cure = f"name the device by --device {backend.device.type}" if where == "cpu" else "leave out --kernels"
        raise ConfigError(f"the {name} kernels compute on {backend.device.type}, the experts are on {where}: {cure}")
    return backend


def on_device(
    config: EngineConfig, backend: Backend, device: Device | None, experts: ExpertArena | None, num_threads: int
) -> tuple[Backend, RoutingObserver | None]:
    """-> the backend whose calls run where the experts' slots are, and what waits there for the end of a step.

    A GPU runs what is called in the order of its compute stream, which cache and leases use too, and logits are waited
    for. Of a device that has to be told, calls are put into that stream.
    """
    shares = config.cache.cpu_experts
    if not isinstance(experts, DeviceExperts) or device is None:
        if shares:
            raise ConfigError("experts are computed on the CPU anyway: leave out --cpu-experts, or name a device")
        return backend, None
    if device.runs_kernels:
        if shares:
            experts.share_with_cpu(choose_backend("auto", num_threads))
        return backend, None
    on_stream = StreamBackend(backend, device, experts.pool.region)
    if shares:
        experts.share_with_cpu(backend, on_stream.one_at_a_time)
    return on_stream, StepEnd(device)
