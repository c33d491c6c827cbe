"""Compiles a recorded launch for a GPU that need not be there, as the launch itself would be, and reads the result."""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from kernels.gpu.launch import Launch

_POINTERS = {
    torch.float32: "*fp32",
    torch.bfloat16: "*bf16",
    torch.int8: "*i8",
    torch.uint8: "*u8",
    torch.int32: "*i32",
    torch.int64: "*i64",
}
_INSTRUCTION = re.compile(r"\b(?:mma\.sync|wgmma\.mma_async|tcgen05\.mma|v_mfma)\S*")


@dataclass(frozen=True, slots=True)
class Resources:
    """What a compiled kernel takes; registers per thread."""

    registers: int
    spilled_nbytes: int  # of local memory per thread
    shared_nbytes: int
    num_warps: int
    instructions: tuple[str, ...]  # of the tensor cores, without what only tells the short side's size


def target(arch: str) -> GPUTarget:
    """sm_90, gfx942."""
    if arch.startswith("sm_"):
        return GPUTarget("cuda", int(arch.removeprefix("sm_")), 32)
    return GPUTarget("hip", arch, 64)


def compile_launch(launch: Launch, arch: str) -> Any:
    """-> Triton's compiled kernel. Arguments are specialised as by Triton at a launch: 1 and multiples of 16."""
    signature: dict[str, str] = {}
    constants: dict[str, Any] = dict(launch.constants)
    attributes: dict[tuple[int, ...], list[list[Any]]] = {}
    for i, name in enumerate(launch.kernel.arg_names):
        if name in launch.constants:
            signature[name] = "constexpr"
            continue
        arg = launch.args[i]
        is_divisible = isinstance(arg, Tensor)
        if isinstance(arg, Tensor):
            signature[name] = _POINTERS[arg.dtype]
        elif isinstance(arg, float):
            signature[name] = "fp32"
        elif arg == 1:
            signature[name] = "constexpr"
            constants[name] = 1
        else:
            signature[name] = "i32" if abs(arg) < 2**31 else "i64"
            is_divisible = arg % 16 == 0
        if is_divisible:
            attributes[(i,)] = [["tt.divisibility", 16]]
    source = ASTSource(launch.kernel, signature, constants, attributes)
    return triton.compile(source, target=target(arch), options=dict(launch.options))


def resources_of(compiled: Any) -> Resources:
    """Read from the compiled code itself."""
    if "cubin" in compiled.asm:
        registers, spilled = _read_cubin(compiled.asm["cubin"])
        text = compiled.asm["ptx"]
    else:
        text = compiled.asm["amdgcn"]
        registers = max(map(int, re.findall(r"\.vgpr_count:\s+(\d+)", text)))
        spilled = max(map(int, re.findall(r"\.private_segment_fixed_size:\s+(\d+)", text)))
    found = Counter(_INSTRUCTION.findall(text))
    return Resources(
        registers,
        spilled,
        compiled.metadata.shared,
        compiled.metadata.num_warps,
        tuple(sorted({family(instruction) for instruction in found})),
    )


def family(instruction: str) -> str:
    """An instruction's name without the size of its short side: what decides the order of a sum remains."""
    name = instruction.removesuffix(";").replace(".sync.aligned", "").replace(".satfinite", "")
    if name.startswith("wgmma"):
        return re.sub(r"(m\d+)n\d+(k\d+)", r"\1\2", name)
    return name


def _read_cubin(cubin: bytes) -> tuple[int, int]:
    """-> registers and bytes of local memory per thread, by the tool that comes with Triton."""
    tool = triton.knobs.nvidia.cuobjdump.path
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "kernel.cubin"
        path.write_bytes(cubin)
        done = subprocess.run([tool, "-res-usage", str(path)], capture_output=True, text=True, check=True)
    found = re.search(r"REG:(\d+) STACK:(\d+) .*LOCAL:(\d+)", done.stdout)
    if found is None:
        raise RuntimeError(f"cuobjdump says no registers: {done.stdout!r}")
    registers, stack, local = map(int, found.groups())
    return registers, stack + local
