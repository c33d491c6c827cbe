"""Builds the native libraries with the system's compiler; everything else is in pyproject.toml."""

from __future__ import annotations

import os
import platform
import shlex
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

KERNELS, TRANSFER = Path("kernels/cpu/src"), Path("cache/native")
FLAGS = ["-std=c++17", "-O3", "-fPIC", "-ffp-contract=off", "-fvisibility=default", "-Wall", "-Wextra", "-pthread"]
# portable first: of inline code that several objects have, the linker keeps the first, which must run anywhere
ISA_FLAGS = {"kernels_portable.cpp": []}
if platform.machine() in ("x86_64", "AMD64"):
    ISA_FLAGS["kernels_avx2.cpp"] = ["-DFG_AVX2", "-mavx2", "-mfma", "-mf16c"]
    avx512 = [
        "-DFG_AVX512",
        "-Wno-maybe-uninitialized",  # of GCC 12 about its own header
        "-Wno-uninitialized",
        *(f"-mavx512{part}" for part in ("f", "bw", "dq", "vl", "vnni", "bf16")),
        "-mavx2",
        "-mfma",
        "-mf16c",
    ]
    ISA_FLAGS["kernels_avx512.cpp"] = avx512
    ISA_FLAGS["kernels_amx.cpp"] = [*avx512, "-DFG_AMX", "-mamx-tile", "-mamx-int8", "-mamx-bf16"]


def _compiles_amx(compiler: list[str]) -> bool:
    """Whether the compiler (GCC 11, Clang 12 or newer) knows the tile instructions; says so if not."""
    if "kernels_amx.cpp" not in ISA_FLAGS:
        return False
    command = [*compiler, "-mamx-tile", "-mamx-int8", "-mamx-bf16", "-x", "c++", "-fsyntax-only", "/dev/null"]
    if subprocess.run(command, stderr=subprocess.DEVNULL, check=False).returncode == 0:
        return True
    print("WARNING: this compiler does not know AMX; CPUs that have it will run the AVX-512 kernels.", file=sys.stderr)
    return False


def _kernel_sources(compiler: list[str]) -> dict[Path, list[str]]:
    defines = ["-DFG_HAS_AMX"] if _compiles_amx(compiler) else []
    names = [name for name in ISA_FLAGS if defines or name != "kernels_amx.cpp"]
    return {
        KERNELS / name: [*defines, *ISA_FLAGS.get(name, [])]
        for name in ("api.cpp", "route.cpp", "thread_pool.cpp", *names)
    }


def _transfer_sources(compiler: list[str]) -> dict[Path, list[str]]:
    return {TRANSFER / "transfer.cpp": []}


LIBRARIES = {"kernels.cpu.libforegate": _kernel_sources, "cache.native.libforegate_io": _transfer_sources}


class BuildNative(build_ext):
    """Shared libraries without Python in them, so one build serves every version. Both are optional."""

    def get_ext_filename(self, fullname: str) -> str:
        return str(Path(*fullname.split("."))) + ".so"

    def build_extension(self, ext: Extension) -> None:
        compiler = shlex.split(os.environ.get("CXX", "")) or [shutil.which("c++") or shutil.which("g++") or "clang++"]
        extra = shlex.split(os.environ.get("FOREGATE_CXXFLAGS", ""))
        target = Path(self.get_ext_fullpath(ext.name))
        target.parent.mkdir(parents=True, exist_ok=True)
        try:
            with tempfile.TemporaryDirectory() as scratch:
                objects = []
                for source, flags in LIBRARIES[ext.name](compiler).items():
                    objects.append(str(Path(scratch, source.name).with_suffix(".o")))
                    command = [*compiler, *FLAGS, *flags, *extra, "-c", str(source), "-o", objects[-1]]
                    subprocess.run(command, check=True)
                subprocess.run([*compiler, "-shared", "-pthread", *extra, *objects, "-o", str(target)], check=True)
        except (OSError, subprocess.CalledProcessError) as error:
            print(f"WARNING: {ext.name} was not built ({error}).", file=sys.stderr)
            print("WARNING: Foregate will run on its slow reference in its place. Install a C++17", file=sys.stderr)
            print("WARNING: compiler (on Debian: apt-get install g++) and install Foregate again.", file=sys.stderr)
            target.unlink(missing_ok=True)

    def copy_extensions_to_source(self) -> None:
        for ext in self.extensions:
            built = Path(self.build_lib) / self.get_ext_filename(ext.name)
            if built.exists():
                shutil.copy2(built, self.get_ext_filename(ext.name))


setup(
    ext_modules=[Extension(name, sources=[], optional=True) for name in LIBRARIES],
    cmdclass={"build_ext": BuildNative},
)
