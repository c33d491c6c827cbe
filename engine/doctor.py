"""Is this machine ready: what is there, what it does, and whether its kernels are right. Changes nothing."""

from __future__ import annotations

import os
import platform
import resource
import shutil
import statistics
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Literal

import msgspec
import torch

from cache.device.device import Device, DeviceOutOfMemory, DeviceUnavailable, Region
from cache.host_memory import huge_pages
from engine.config import format_nbytes
from engine.device_experts import open_named
from engine.doctor_kernels import ARCHES, MAX_ERROR, compiled, depends_on_company, errors
from engine.errors import ConfigError
from engine.machine import measure_machine
from kernels.backend import BACKENDS, Backend

Verdict = Literal["ok", "absent", "bad"]

_CPU_FLAGS = ("avx2", "f16c", "avx512f", "avx512_vnni", "avx512_bf16", "amx_int8", "amx_bf16")
_COPY_NBYTES = 64 * 1024**2
_NUM_COPIES = 5


class Finding(msgspec.Struct, frozen=True):
    """`absent`: not here, which may be all right; `bad`: here and wrong."""

    name: str
    verdict: Verdict
    text: str


def examine(near: Path) -> Iterator[Finding]:
    """All checks, each as it is done; `near`: where packed experts go, whose disk is measured. Takes some seconds."""
    yield _software()
    yield _cpu()
    machine = measure_machine(near, ())
    yield Finding("memory", "ok", f"{format_nbytes(machine.free_nbytes)} free, {_rate(machine.memory_bandwidth)}")
    yield Finding(
        "disk",
        "ok",
        f"{_rate(machine.disk_bandwidth)} random, {format_nbytes(machine.disk_free_nbytes)} free at {near}",
    )
    yield pages(huge_pages())
    yield _locked_memory()
    for name, make in BACKENDS.items():
        if name != "reference":
            yield numerics(name, make)
    yield _compilation()
    yield _driver()
    yield from _gpu()


def pages(setting: str | None) -> Finding:
    """`setting`: see `huge_pages`."""
    title = "huge pages"
    if setting in ("always", "madvise"):
        return Finding(title, "ok", setting)
    slow = "reads into memory of small pages are slower and cost more of the processor"
    if setting is None:
        return Finding(title, "absent", f"this system has none: {slow}")
    how = "write madvise into /sys/kernel/mm/transparent_hugepage/enabled"
    return Finding(title, "absent", f"{setting}: {slow}; {how}")


def numerics(name: str, make: Callable[[int], Backend]) -> Finding:
    """All that these kernels compute, in every format, beside the reference's; and whether rows depend on others."""
    title = f"{name} kernels"
    try:
        backend, reference = make(len(os.sched_getaffinity(0))), BACKENDS["reference"](1)
    except (RuntimeError, ImportError) as error:
        return Finding(title, "absent", str(error))
    try:
        found = dict(errors(backend, reference))
        dependent = list(depends_on_company(backend)) if name != "reference" else []
    except Exception as error:  # a compiler's or a driver's: whatever it is belongs into the report
        return Finding(title, "bad", f"{type(error).__name__}: {error}")
    text = ", ".join(f"{kernel} {error:.1e}" for kernel, error in found.items())
    isa = f"{backend.isa}; " if hasattr(backend, "isa") else ""
    # written so that an error that is no number is bad
    is_right = all(error <= MAX_ERROR for error in found.values()) and not dependent
    company = f"; a row's bits depend on its company: {', '.join(dependent)}" if dependent else ""
    return Finding(title, "ok" if is_right else "bad", f"{isa}error against the reference: {text}{company}")


def compilation(arches: Sequence[str], gpu: str = "") -> Finding:
    """Whether Triton compiles for these architectures; `gpu`: whose tuned tiles are taken."""
    title = "Triton's compiler"
    try:
        found = compiled(arches, gpu)
    except RuntimeError as error:
        return Finding(title, "absent", str(error))
    words = [
        f"{one.arch}: {one.why or f'{one.registers} registers, {one.spilled_nbytes} bytes spilled'}" for one in found
    ]
    is_right = not any(one.why or one.spilled_nbytes for one in found)
    return Finding(
        title, "ok" if is_right else "bad", f"{'; '.join(words)} ({'for this GPU' if gpu else 'ahead of time'})"
    )


def link(device: Device) -> tuple[float, float]:
    """Bytes/s of copies from pinned memory to the device, and back."""
    arena = device.allocate(_COPY_NBYTES)
    memory = device.pinned(_COPY_NBYTES)
    stream = device.stream("doctor")
    region = Region(arena, 0, _COPY_NBYTES)

    def rate(copy: Callable[[], None]) -> float:
        times = []
        for _ in range(_NUM_COPIES):
            began = time.perf_counter()
            copy()
            stream.synchronize()
            times.append(time.perf_counter() - began)
        return _COPY_NBYTES / statistics.median(times)

    try:
        return rate(lambda: stream.copy_in(region, memory)), rate(lambda: stream.copy_out(memory, region))
    finally:
        arena.free()


def copies_are_right(device: Device) -> bool:
    """Whether bytes that went up by one stream came back by another, which waited for it, as they were."""
    nbytes = 1024**2
    arena, there, back = device.allocate(nbytes), device.pinned(nbytes), device.pinned(nbytes)
    there[:] = os.urandom(nbytes)
    up, down = device.stream("up"), device.stream("down")
    region = Region(arena, 0, nbytes)
    try:
        up.copy_in(region, there)
        down.wait(up.record())
        down.copy_out(back, region)
        down.synchronize()
        return bytes(there) == bytes(back)
    finally:
        arena.free()


def _compilation() -> Finding:
    """For the GPU that is here, or ahead of time for those that we know."""
    if not torch.cuda.is_available() or torch.version.hip is not None:
        return compilation(ARCHES)
    major, minor = torch.cuda.get_device_capability()
    return compilation([f"sm_{major}{minor}"], torch.cuda.get_device_name())


def _software() -> Finding:
    names = ("foregate", "torch", "triton", "numpy")
    parts = [f"Python {platform.python_version()}", *(f"{name} {_version(name)}" for name in names)]
    return Finding("software", "ok", f"{', '.join(parts)}; {platform.platform()}")


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "not installed"


def _cpu() -> Finding:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    flags = next((line.partition(":")[2].split() for line in lines if line.startswith("flags")), [])
    model = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "unknown CPU")
    known = [flag for flag in _CPU_FLAGS if flag in flags]
    return Finding(
        "CPU", "ok", f"{model}, {len(os.sched_getaffinity(0))} cores for us: {' '.join(known) or 'portable'}"
    )


def _locked_memory() -> Finding:
    limit = resource.getrlimit(resource.RLIMIT_MEMLOCK)[0]
    text = "no limit" if limit == resource.RLIM_INFINITY else f"{format_nbytes(limit)} (ulimit -l)"
    return Finding("locked memory", "ok", text)


def _driver() -> Finding:
    smi = shutil.which("nvidia-smi")
    if smi is None:
        return Finding("GPU driver", "absent", "there is no nvidia-smi")
    query = ["--query-gpu=name,driver_version,memory.total,pcie.link.gen.current,pcie.link.width.current"]
    done = subprocess.run(
        [smi, *query, "--format=csv,noheader"], capture_output=True, text=True, check=False, timeout=60
    )
    if done.returncode != 0:
        return Finding("GPU driver", "bad", (done.stderr or done.stdout).strip())
    return Finding("GPU driver", "ok", "; ".join(done.stdout.strip().splitlines()))


def _gpu() -> Iterator[Finding]:
    try:
        device = open_named("cuda")
    except (ConfigError, DeviceUnavailable) as error:
        yield Finding("GPU", "absent", f"{error} (torch {torch.__version__}, built for CUDA {torch.version.cuda})")
        return
    assert device is not None
    try:
        free, total = device.memory()
        yield Finding("GPU", "ok", f"{format_nbytes(free)} of {format_nbytes(total)} free")
        is_right = copies_are_right(device)
        up, down = link(device)
        yield Finding(
            "link",
            "ok" if is_right else "bad",
            f"{_rate(up)} up, {_rate(down)} down, from pinned memory"
            if is_right
            else "bytes came back from the GPU as others than had gone up",
        )
    except (DeviceOutOfMemory, RuntimeError) as error:
        yield Finding("link", "bad", str(error))
    finally:
        device.close()


def _rate(bandwidth: float | None) -> str:
    return "not measured" if bandwidth is None else f"{format_nbytes(int(bandwidth))}/s"
