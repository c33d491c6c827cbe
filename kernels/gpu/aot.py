"""`python -m kernels.gpu.aot`: compiles every kernel for GPUs that are not there, for docs/gpu-kernels.*.

Nothing is run: registers, spills, shared memory and instructions are read from the compiled code, occupancy follows
from them, and the roofline from published rates.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import triton

from kernels.gpu.cases import Case, all_cases
from kernels.gpu.compile import Resources, compile_launch, resources_of
from kernels.gpu.configs import load_configs
from kernels.gpu.launch import INTERPRETED
from kernels.gpu.limits import GPUS, LIMITS, blocks_at_once, bound

DOCS = Path(__file__).parents[2] / "docs"
ARCHES = tuple(LIMITS)
Row = dict[str, Any]


def rows_of(arch: str, numbers: Iterable[int] | None = None) -> Iterator[Row]:
    """Compile all cases of an architecture, or those of the given numbers."""
    wanted = None if numbers is None else set(numbers)
    for number, case in enumerate(all_cases(load_configs("", arch))):
        if wanted is None or number in wanted:
            yield _row(arch, number, case, resources_of(compile_launch(case.launch, arch)))


def _row(arch: str, number: int, case: Case, resources: Resources) -> Row:
    limits = LIMITS[arch]
    blocks = blocks_at_once(resources, limits)
    row: Row = {
        "arch": arch,
        "number": number,
        "kernel": case.kernel,
        "format": case.format,
        "variant": case.variant,
        "tile": case.tile,
        "registers": resources.registers,
        "spilled_nbytes": resources.spilled_nbytes,
        "shared_nbytes": resources.shared_nbytes,
        "blocks": blocks,
        "occupancy": round(blocks * resources.num_warps / limits.num_warps, 3),
        "instructions": list(resources.instructions),
    }
    if case.nbytes:
        row |= {"nbytes": case.nbytes, "operations": case.num_operations}
        row["bound"] = bound(GPUS[arch], case.format, case.nbytes, case.num_operations)
    return row


def source_hash() -> str:
    """Of everything that a row depends on: a table that is older than its kernels is found out without compiling."""
    digest = hashlib.sha256(triton.__version__.encode())
    here = Path(__file__).parent
    for path in sorted([*here.glob("*.py"), *(here / "configs").glob("*.json")]):
        if path.name not in ("aot.py", "backend.py", "tune.py", "tune_work.py"):
            digest.update(path.name.encode() + path.read_bytes())
    return digest.hexdigest()


def as_markdown(table: Row) -> str:
    """The table for readers."""
    lines = [
        "# The GPU kernels as compiled",
        "",
        f"Made by `make gpu-table` (`python -m kernels.gpu.aot`) with Triton {table['triton']}; do not edit. No GPU",
        "was there: nothing below is a measurement. Registers (a thread's), spills (its bytes of local memory) and",
        "shared memory are read from the compiled code; occupancy is what they allow (warps of a multiprocessor's);",
        "tensor instructions are named without the size of the short side. Bytes and operations are one program's",
        "(attention: of one tile of 64 keys), and the bound is what published rates say of data in its memory.",
        "Shapes are Qwen3-30B-A3B's; tiles are rows x outputs, warps, stages. See [triton.md](triton.md).",
    ]
    for arch, gpu in GPUS.items():
        rates = ", ".join(f"{name} {rate / 1e12:g}" for name, rate in gpu.operations.items())
        ridge = gpu.operations["int8"] / gpu.memory_nbytes
        lines += [
            "",
            f"## {arch}",
            "",
            f"Derived with {gpu.name}'s published rates: memory {gpu.memory_nbytes / 1e12:g} TB/s, link "
            f"{gpu.link_nbytes / 1e9:g} GB/s, T operations/s {rates}. int8 and int4 turn from memory to compute at "
            f"{ridge:.0f} operations a byte.",
            "",
            "| kernel | format | variant | tile | regs | spills | shared | occupancy | tensor instruction "
            "| bytes | operations | ops/byte | bound |",
            "| --- | --- | --- | --- | ---: | ---: | ---: | ---: | --- | ---: | ---: | ---: | --- |",
        ]
        lines += [_line(row) for row in table["rows"] if row["arch"] == arch]
    return "\n".join(lines) + "\n"


def _line(row: Row) -> str:
    work = ["", "", "", ""]
    if "nbytes" in row:
        intensity = row["operations"] / row["nbytes"]
        work = [str(row["nbytes"]), str(row["operations"]), f"{intensity:.1f}", row["bound"]]
    cells = [
        *(row[name] for name in ("kernel", "format", "variant", "tile")),
        *(str(row[name]) for name in ("registers", "spilled_nbytes", "shared_nbytes")),
        f"{row['occupancy']:.0%}",
        ", ".join(row["instructions"]),
        *work,
    ]
    return "| " + " | ".join(cells) + " |"


def main() -> None:
    """Write both files; exits with 1 if a default configuration spills."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--arch", action="append", choices=ARCHES, help="only these; others' rows are kept if nothing changed"
    )
    parser.add_argument("--jobs", type=int, default=2)
    args = parser.parse_args()
    if INTERPRETED:
        sys.exit("unset TRITON_INTERPRET: the interpreter compiles nothing")
    path = DOCS / "gpu-kernels.json"
    wanted = args.arch or list(ARCHES)
    table: Row = json.loads(path.read_text()) if path.exists() else {"source": None}
    kept = table["rows"] if table["source"] == source_hash() else []  # of other sources: nothing
    rows = [row for row in kept if row["arch"] not in wanted]
    numbers = range(sum(1 for _ in all_cases(load_configs("", "default"))))
    tasks = [(arch, number) for arch in wanted for number in numbers]
    with ProcessPoolExecutor(args.jobs, mp_context=get_context("spawn")) as pool:
        for done in pool.map(_compile_one, tasks):
            rows += done
            for row in done:
                sys.stderr.write(f"{_line(row)}\n")
    rows.sort(key=lambda row: (ARCHES.index(row["arch"]), row["number"]))
    table = {"triton": triton.__version__, "source": source_hash(), "rows": rows}
    path.write_text(json.dumps(table, indent=0) + "\n")
    (DOCS / "gpu-kernels.md").write_text(as_markdown(table))
    if any(row["spilled_nbytes"] for row in rows):
        sys.exit("a default configuration spills registers")


def _compile_one(task: tuple[str, int]) -> list[Row]:
    return list(rows_of(task[0], [task[1]]))


if __name__ == "__main__":
    main()
