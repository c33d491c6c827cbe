"""Devices that experts are computed on, by name. Importing this needs neither torch nor a GPU."""

from __future__ import annotations

from collections.abc import Callable

from cache.device.device import Device


def _cuda() -> Device:
    from cache.device.cuda import CudaDevice

    return CudaDevice()


def _sim() -> Device:
    from cache.device.sim import SimDevice

    return SimDevice()


DEVICES: dict[str, Callable[[], Device]] = {"cuda": _cuda, "sim": _sim}


def open_device(name: str) -> Device:
    """The device of that name. Raises `ValueError` for an unknown one, `DeviceUnavailable` for one not here."""
    if name not in DEVICES:
        raise ValueError(f"unknown device {name!r}; known: cpu, {', '.join(DEVICES)}")
    return DEVICES[name]()
