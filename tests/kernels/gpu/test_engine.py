"""The whole engine on the Triton kernels, interpreted: the CPU engine's greedy tokens; and what the backend refuses."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from engine.config import CacheConfig, EngineConfig
from engine.engine import Engine
from kernels.backend import Backend, choose_backend
from kernels.gpu.backend import TritonBackend
from kernels.torch_backend import TorchBackend
from tests.engine.conftest import greedy, run_all, tokens_of
from tests.engine.tiny_models import make_checkpoint
from tests.kernels.backends import make_backend


def tokens(directory: Path, backend: Backend, format: str, dtype: str) -> dict[str, list[int]]:
    config = EngineConfig(
        model=directory,
        dtype=dtype,
        kv_memory_nbytes=4 * 1024**2,
        max_model_len=64,
        cache=CacheConfig(format=format, memory_nbytes=160_000),
    )
    engine = Engine(config, backend=backend)
    # a chunk of each at first, then chunk and decode rows together, then decode rows alone
    requests = {"a": ([7, 3, 9, 250, 3, 14, 15, 9, 2, 6, 5], greedy(4)), "b": ([33, 66], greedy(3))}
    outputs = run_all(engine, requests)
    engine.check_integrity()
    engine.close()
    return {name: tokens_of(each) for name, each in outputs.items()}


@pytest.mark.parametrize(
    ("variant", "format", "dtype"),
    [
        ("mixtral", "int4", "int4"),
        ("olmoe-gqa-clip", "float32", "float32"),
    ],
)
def test_the_engine_gives_the_cpu_engines_greedy_tokens(tmp_path: Path, variant: str, format: str, dtype: str):
    make_checkpoint(tmp_path, variant)
    expected = tokens(tmp_path, make_backend("native-portable", 1), format, dtype)
    assert len(set(expected["a"])) > 1
    assert tokens(tmp_path, TritonBackend(), format, dtype) == expected


def test_the_backend_is_in_the_table_and_takes_only_its_own_matrices(backend: TritonBackend):
    assert choose_backend("triton", 1).name == "triton"
    linear = backend.make_linear(torch.randn(32, 64), None, "int8")
    with pytest.raises(ValueError, match="does not fit a matrix"):
        linear(torch.randn(2, 32))
    with pytest.raises(ValueError, match="expected contiguous"):
        linear(torch.randn(64, 2).T)
    with pytest.raises(ValueError, match="top-7 does not fit a router of 6"):
        backend.make_router(
            torch.ones(64), 1e-5, backend.make_linear(torch.randn(6, 64), None, "float32"), 7, "softmax"
        )
    with pytest.raises(ValueError, match="do not fit down of 64 inputs"):
        backend.make_mlp(None, 1e-5, linear, linear)
    with pytest.raises(TypeError, match="made by another backend"):
        backend.make_mlp(None, 1e-5, TorchBackend().make_linear(torch.randn(6, 64), None, "float32"), linear)


def test_without_a_gpu_and_without_the_interpreter_there_is_a_clear_error():
    code = (
        "import torch\nfrom kernels.backend import choose_backend\nfrom kernels.gpu.norm import rms_norm\n"
        "for run in (lambda: choose_backend('triton', 1), lambda: rms_norm(torch.ones(1, 4), torch.ones(4), 1e-5)):\n"
        "    try:\n        run()\n    except RuntimeError as error:\n        print(error)\n"
    )
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    if not torch.cuda.is_available():
        first, second = done.stdout.splitlines()
        assert "need a GPU that torch can use" in first
        assert "--kernels native runs on the CPU" in first
        assert "need a GPU; without one they run only in Triton's interpreter" in second
