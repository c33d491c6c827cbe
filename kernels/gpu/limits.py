"""What a processor of each architecture holds, and what is published of GPUs: no measurement.

Limits are those of the CUDA programming guide's table of compute capabilities and of AMD's CDNA 3 guide; rates are the
data sheets', dense, without sparsity.
"""

from __future__ import annotations

from dataclasses import dataclass

from kernels.gpu.compile import Resources


@dataclass(frozen=True, slots=True)
class Limits:
    """Of one multiprocessor (a compute unit on AMD)."""

    num_registers: int  # of 32 bits
    register_unit: int  # a warp's are given out in such portions
    num_warps: int
    num_blocks: int
    shared_nbytes: int
    reserved_nbytes: int  # of shared memory, per block
    warp_size: int = 32


@dataclass(frozen=True, slots=True)
class Gpu:
    """Published rates, per second."""

    name: str
    memory_nbytes: float  # read a second
    link_nbytes: float  # PCIe x16, one way, less its encoding
    operations: dict[str, float]  # by format of the products' operands


LIMITS = {
    "sm_80": Limits(65536, 256, 64, 32, 164 * 1024, 1024),
    "sm_90": Limits(65536, 256, 64, 32, 228 * 1024, 1024),
    "sm_100": Limits(65536, 256, 64, 32, 228 * 1024, 1024),
    "sm_120": Limits(65536, 256, 48, 24, 100 * 1024, 1024),
    "gfx942": Limits(131072, 512, 32, 32, 64 * 1024, 0, 64),
}
GPUS = {
    "sm_80": Gpu("A100 80 GB", 2.039e12, 31.5e9, {"float32": 19.5e12, "bf16": 312e12, "int8": 624e12}),
    "sm_90": Gpu("H100 SXM", 3.35e12, 63e9, {"float32": 67e12, "bf16": 989e12, "int8": 1979e12}),
    "sm_100": Gpu("B200", 8e12, 63e9, {"float32": 75e12, "bf16": 2250e12, "int8": 4500e12}),
    "sm_120": Gpu("RTX 5090", 1.792e12, 63e9, {"float32": 104.8e12, "bf16": 209.5e12, "int8": 838e12}),
    "gfx942": Gpu("MI300X", 5.3e12, 63e9, {"float32": 163.4e12, "bf16": 1307e12, "int8": 2614e12}),
}


def blocks_at_once(resources: Resources, limits: Limits) -> int:
    """Blocks that fit a multiprocessor together, by registers, shared memory and warps; 0: it cannot be started."""
    per_warp = -(-resources.registers * limits.warp_size // limits.register_unit) * limits.register_unit
    by_registers = limits.num_registers // (per_warp * resources.num_warps)
    shared = -(-(resources.shared_nbytes + limits.reserved_nbytes) // 128) * 128
    by_shared = limits.shared_nbytes // shared if shared else limits.num_blocks
    return min(by_registers, by_shared, limits.num_warps // resources.num_warps, limits.num_blocks)


def bound(gpu: Gpu, format: str, nbytes: int, num_operations: int) -> str:
    """What the rates say is the slower part of a tile, once its weights are in the GPU's memory."""
    compute_s = num_operations / gpu.operations["int8" if format == "int4" else format]
    return "memory" if nbytes / gpu.memory_nbytes > compute_s else "compute"
