"""Pins what the images install, with hashes: `pip install uv`, then `python deploy/lock.py`.

requirements.txt: all but torch. requirements-gpu.txt: torch as PyPI has it and the CUDA libraries that it brings. The
CPU image takes the same version of torch from an index of builds without CUDA, whose hashes are others.
"""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

FOLDER = Path(__file__).parent
OLDEST_PYTHON = "3.11"  # of the images
_GPU = re.compile(r"(torch|triton|nvidia-.*|cuda-.*)==")
_HEAD = "# Written by deploy/lock.py; do not edit.\n"


def split(compiled: str) -> tuple[str, str]:
    """(common, gpu) of what uv has written: a requirement is a line and the indented ones that follow it."""
    blocks = re.findall(r"^[A-Za-z0-9].*\n(?:[ \t]+.*\n)*", compiled, flags=re.MULTILINE)
    parts: tuple[list[str], list[str]] = ([], [])
    for block in blocks:
        parts[bool(_GPU.match(block))].append(block)
    common, gpu = (_HEAD + "".join(part) for part in parts)
    return common, gpu


def main() -> None:
    command = [sys.executable, "-m", "uv", "pip", "compile", "pyproject.toml", "--universal", "--quiet"]
    command += ["--python-version", OLDEST_PYTHON, "--generate-hashes", "--no-annotate", "--no-header"]
    done = subprocess.run(command, cwd=FOLDER.parent, stdout=subprocess.PIPE, text=True, check=True)
    for name, text in zip(("requirements.txt", "requirements-gpu.txt"), split(done.stdout), strict=True):
        (FOLDER / name).write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
