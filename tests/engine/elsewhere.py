"""A GPU as torch shows it, without one: tensors that do not mix with the host's, kernels run by Triton's interpreter.

`Elsewhere` is a tensor whose bytes are in host memory, but whose device is another: `meta`, as torch without CUDA can
do nothing with the name of `cuda`, while its own `meta` tensors have no bytes. As on a GPU, an operation on it and
on a tensor of the host is refused, `numpy` is refused, and only `cpu`, `to`, `tolist`, `item` and copies cross. So what
would stop on the first step on a GPU for a tensor in the wrong place stops here.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map
from triton.runtime.interpreter import GridExecutor

from cache.device.device import Event
from cache.device.sim import Adversary, SimArena, SimDevice, SimStream

ELSEWHERE = torch.device("meta")


class Elsewhere(Tensor):
    """Of a GPU, as far as anybody can see."""

    inner: Tensor

    @staticmethod
    def __new__(cls, inner: Tensor) -> Elsewhere:
        made = Tensor._make_wrapper_subclass(
            cls, inner.shape, strides=inner.stride(), dtype=inner.dtype, device=ELSEWHERE, requires_grad=False
        )
        made.inner = inner
        return made

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is Tensor.numpy:
            raise TypeError("can't convert a tensor that is elsewhere to numpy")
        if func in (Tensor.tolist, Tensor.data_ptr):
            return func(args[0].inner)
        with torch._C.DisableTorchFunctionSubclass():  # else what comes to the host would be called one of us
            return func(*args, **(kwargs or {}))

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        name = func.overloadpacket.__name__
        if name == "_local_scalar_dense":
            return func(args[0].inner)
        if name in ("to", "_to_copy"):
            wanted = [x for x in (*args[1:], *kwargs.values()) if isinstance(x, torch.device)]
            args = [torch.device("cpu") if isinstance(x, torch.device) else unwrap(x) for x in args]
            copied = func(*args, **{n: torch.device("cpu") if n == "device" else x for n, x in kwargs.items()})
            return copied if wanted and not _is_elsewhere(wanted[0]) else Elsewhere(copied)
        if name != "copy_":
            tensors = [x for x in torch.utils._pytree.tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
            if any(not isinstance(x, Elsewhere) and x.dim() for x in tensors):
                raise RuntimeError(f"{name}: expected all tensors to be on the same device")
        if "device" in kwargs:
            kwargs["device"] = torch.device("cpu")
        result = func(*tree_map(unwrap, args), **tree_map(unwrap, kwargs))
        if name.endswith("_") and isinstance(args[0], Elsewhere):
            return args[0]
        return tree_map(lambda x: Elsewhere(x) if isinstance(x, Tensor) else x, result)


def unwrap(x: Any) -> Any:
    return x.inner if isinstance(x, Elsewhere) else x


def _is_elsewhere(device: str | torch.device) -> bool:
    return torch.device(device).type == ELSEWHERE.type


_plain_to = Tensor.to


def _to(self: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """Of any thread, which a mode is not."""
    wanted = args[0] if args else kwargs.get("device")
    is_device = isinstance(wanted, (str, torch.device))
    if is_device and not isinstance(self, Elsewhere) and _is_elsewhere(wanted):  # type: ignore[arg-type]
        return Elsewhere(self.clone())
    return _plain_to(self, *args, **kwargs)


class _Factories(TorchFunctionMode):
    """What is made elsewhere."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        device = kwargs.get("device")
        if device is not None and _is_elsewhere(device) and func is not _plain_to:
            return Elsewhere(func(*args, **{**kwargs, "device": "cpu"}))
        return func(*args, **kwargs)


class _Compute(SimStream):
    """Kernels run when they are called, so what they wait for is waited for by who calls."""

    def wait(self, event: Event) -> None:
        event.synchronize()


class _Arena(SimArena):
    def tensor(self) -> Any:
        return Elsewhere(super().tensor())


class ElsewhereDevice(SimDevice):
    """To the engine what a GPU is: kernels are called, and no one puts them into a stream."""

    name = "elsewhere"
    tensors_on = ELSEWHERE.type
    runs_kernels = True

    def __init__(self, memory_nbytes: int = 1024**3, adversary: Adversary | None = None) -> None:
        super().__init__(memory_nbytes, adversary)
        self._compute.__class__ = _Compute

    def allocate(self, nbytes: int) -> SimArena:
        arena = super().allocate(nbytes)
        arena.__class__ = _Arena
        return arena


@contextmanager
def elsewhere(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Within, there is such a device for torch and Triton's interpreter."""
    call = GridExecutor.__call__

    def call_elsewhere(self: GridExecutor, *args: Any, **kwargs: Any) -> Any:
        for x in (*args, *kwargs.values()):
            if isinstance(x, Tensor) and not isinstance(x, Elsewhere):
                raise ValueError("Pointer argument cannot be accessed from Triton (cpu tensor?)")
        return call(self, *map(unwrap, args), **{name: unwrap(x) for name, x in kwargs.items()})

    monkeypatch.setattr(GridExecutor, "__call__", call_elsewhere)
    monkeypatch.setattr("kernels.gpu.backend.device_names", lambda device: ("", "interpreter"))
    monkeypatch.setattr(Tensor, "to", _to)
    with _Factories():
        yield
