"""The house: imports only go down, by full path, and what needs no torch does not import it."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FLOORS = ("kernels", "cache", "engine", "server")  # from the ground up
SERVER_MAY_SEE = {
    "engine.admission",
    "engine.async_engine",
    "engine.bench",
    "engine.build",
    "engine.bench_offload",
    "engine.bench_prediction",
    "engine.bench_schedule",
    "engine.bench_simulate",
    "engine.bench_structured",
    "engine.calibrate",
    "engine.calibration",
    "engine.config",
    "engine.convert",
    "engine.doctor",
    "engine.errors",
    "engine.hardware",
    "engine.hub",
    "engine.json_schema",
    "engine.messages",
    "engine.perplexity",
    "engine.plan",
    "engine.train_predictor",
    "engine.tune",
    "engine.refactor.command",
    "engine.sampling_params",
    "engine.schedule_replay",
    "engine.simulate",
    "engine.synthetic",
    "engine.threads",
    "cache.expert_table",
    "cache.histogram",
    "cache.measure",
    "cache.packed_file",
    "cache.placement",
    "cache.replay",
    "cache.reshape",
    "cache.stats",
    "cache.trace",
    "cache.workload",
}


def imports_of(path: Path) -> list[str]:
    names = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            assert all(alias.name != "*" for alias in node.names), f"{path}: star import"
            names.append(node.module or "")
            names += [f"{node.module}.{alias.name}" for alias in node.names]
    return names


def modules_of(floor: str) -> list[Path]:
    return sorted((ROOT / floor).rglob("*.py"))


@pytest.mark.parametrize("floor", FLOORS)
def test_imports_only_go_down(floor: str):
    above = FLOORS[FLOORS.index(floor) + 1 :]
    assert modules_of(floor)
    for path in modules_of(floor):
        for name in imports_of(path):
            assert name.split(".")[0] not in (*above, "tests", "loadtest"), f"{path} imports {name}"


def test_the_cache_sees_of_the_kernels_only_their_formats():
    for path in modules_of("cache"):
        for name in imports_of(path):
            assert not name.startswith("kernels") or name.startswith("kernels.quant"), f"{path} imports {name}"


def test_the_server_sees_only_the_engines_face():
    for path in modules_of("server"):
        for name in imports_of(path):
            if name.split(".")[0] in FLOORS[:-1] and "." in name:
                assert any(name == seen or name.startswith(f"{seen}.") for seen in SERVER_MAY_SEE), f"{path}: {name}"


def test_of_transformers_only_config_and_tokenizer_are_used_at_run_time():
    for floor in FLOORS:
        for path in modules_of(floor):
            for name in imports_of(path):
                if name.split(".")[0] == "transformers":
                    assert name in ("transformers", "transformers.AutoConfig", "transformers.AutoTokenizer"), path


PURE = {
    "kernels": ["kernels", "kernels.quant", "kernels.quant.layout"],
    "cache": [
        str(path.relative_to(ROOT).with_suffix("")).replace("/", ".").removesuffix(".__init__")
        for path in modules_of("cache")
    ],
    "engine": [
        "engine.async_engine",
        "engine.block_manager",
        "engine.child",
        "engine.calibration",
        "engine.config",
        "engine.detokenizer",
        "engine.hardware",
        "engine.hub",
        "engine.json_schema",
        "engine.messages",
        "engine.models",
        "engine.number_tokenizer",
        "engine.request",
        "engine.sampling_params",
        "engine.schedule_replay",
        "engine.scheduler",
        "engine.simulate",
        "engine.stored_tokenizer",
        "engine.tokenizer",
    ],
    "server": [
        str(path.relative_to(ROOT).with_suffix("")).replace("/", ".").removesuffix(".__init__")
        for path in modules_of("server")
    ],
}


@pytest.mark.parametrize("floor", FLOORS)
def test_what_needs_no_torch_does_not_import_it_and_importing_prints_nothing(floor: str):
    code = (
        f"import importlib, sys, threading\nfor name in {PURE[floor]!r}: importlib.import_module(name)\n"
        "assert 'torch' not in sys.modules, 'torch'\nassert 'transformers' not in sys.modules, 'transformers'\n"
        "assert threading.active_count() == 1, 'a thread was started'"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
