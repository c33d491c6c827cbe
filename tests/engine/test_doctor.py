from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import msgspec
import pytest
import torch

from cache.device.device import Region
from cache.device.sim import Adversary, SimDevice, SimStream
from engine.doctor import Finding, compilation, copies_are_right, examine, link, numerics, pages
from kernels.backend import BACKENDS
from kernels.quant.formats import FORMATS
from kernels.torch_backend import TorchBackend

_PRINT = "for arches in (['sm_80', 'sm_120'], ['sm_1']): print(msgspec.json.encode(compilation(arches)).decode())"


@pytest.fixture(scope="module")
def findings(tmp_path_factory: pytest.TempPathFactory):
    return {finding.name: finding for finding in examine(Path(tmp_path_factory.mktemp("near")))}


def test_everything_is_looked_at_and_what_is_here_is_well(findings):
    looked_at = {"software", "CPU", "memory", "disk", "huge pages", "locked memory", "native kernels"}
    assert looked_at | {"GPU driver", "GPU"} <= set(findings)
    assert not [finding for finding in findings.values() if finding.verdict == "bad"]
    assert f"torch {torch.__version__.partition('+')[0]}" in findings["software"].text
    assert all(format in findings["native kernels"].text for format in FORMATS)


@pytest.mark.parametrize(
    ("setting", "verdict"), [("madvise", "ok"), ("always", "ok"), ("never", "absent"), (None, "absent")]
)
def test_huge_pages_that_are_off_are_told_of(setting: str | None, verdict: str):
    assert pages(setting).verdict == verdict


def test_a_gpu_that_is_not_here_is_absent_not_wrong(findings):
    if torch.cuda.is_available():
        pytest.skip("there is one")
    assert findings["GPU"].verdict == "absent"
    assert "no CUDA device" in findings["GPU"].text


class _Wrong(TorchBackend):
    """Of one format, an output is a twentieth too large."""

    def expert_mlp(self, x, routing, records, ready, outputs, add_to=None) -> None:
        super().expert_mlp(x, routing, records, ready, outputs, add_to)
        if records.layout.format == "int4":
            outputs *= 1.05


class _Silent(TorchBackend):
    """Computes nothing."""

    def expert_mlp(self, *args: object) -> None:  # type: ignore[override]
        return


class _Mad(TorchBackend):
    def expert_mlp(self, x, routing, records, ready, outputs, add_to=None) -> None:
        outputs.fill_(float("nan"))


class _Careless(TorchBackend):
    """Adds up a dense layer in another order where there are many rows."""

    def make_linear(self, weight, bias, format):
        linear = super().make_linear(weight, bias, format)

        def careless(x, add_to=None):
            out = linear(x, add_to)
            return out * 1.0001 if format == "int8" and len(x) > 16 else out

        return careless


class _Unaware(TorchBackend):
    """Attention sees only the new rows."""

    def make_attention(self, shape, norm, qkv, output):
        def attention(residual, keys, values, sequences):
            output(qkv(residual)[:, : shape.num_heads * shape.head_dim].contiguous(), add_to=residual)

        return attention


def test_a_row_whose_bits_depend_on_its_company_is_found():
    finding = numerics("others", lambda num_threads: _Careless())
    assert finding.verdict == "bad"
    assert "a row's bits depend on its company: " in finding.text
    assert "dense int8" in finding.text.partition("company")[2]


def test_attention_that_forgets_its_context_is_found():
    assert numerics("others", lambda num_threads: _Unaware()).verdict == "bad"


def test_every_kernel_and_format_is_compared(findings):
    assert findings["native kernels"].verdict == "ok"
    for name in (*FORMATS, *(f"dense {format}" for format in FORMATS), "attention", "router"):
        assert f"{name} " in findings["native kernels"].text


def test_the_expert_kernel_compiles_ahead_of_time_for_gpus_that_are_not_here(tmp_path: Path):
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-c", f"import msgspec\nfrom engine.doctor import compilation\n{_PRINT}"],
        env={**environment, "TRITON_CACHE_DIR": str(tmp_path)},
        capture_output=True,
        text=True,
        check=True,
    )
    found, unknown = (msgspec.json.decode(line, type=Finding) for line in done.stdout.splitlines())
    assert found.verdict == "ok"
    assert re.search(r"sm_80: \d+ registers, 0 bytes spilled; sm_120: \d+ registers, 0 bytes spilled", found.text)
    assert "(ahead of time)" in found.text
    assert unknown.verdict == "bad"  # an architecture that the compiler does not know


def test_the_interpreter_compiles_nothing():
    finding = compilation(["sm_80"])
    assert (finding.verdict, "the interpreter compiles nothing" in finding.text) == ("absent", True)


@pytest.mark.parametrize("kernels", [_Wrong, _Silent, _Mad])
def test_kernels_that_compute_something_else_are_found(kernels):
    assert numerics("others", lambda num_threads: kernels()).verdict == "bad"


def test_kernels_that_cannot_run_here_are_absent_with_the_reason():
    def make(num_threads: int) -> None:
        raise RuntimeError("this CPU cannot")

    finding = numerics("others", make)  # type: ignore[arg-type]
    assert (finding.verdict, finding.text) == ("absent", "this CPU cannot")
    assert numerics("reference", BACKENDS["reference"]).verdict == "ok"


def test_a_links_rate_is_that_of_its_copies_both_ways():
    device = SimDevice(adversary=Adversary(bandwidth=2e9))
    up, down = link(device)
    assert 0 < up <= 2e9
    assert 0 < down <= 2e9
    assert device.memory()[0] == device.memory()[1]
    device.close()


class _LossyStream(SimStream):
    def copy_in(self, to: Region, source: memoryview) -> None:
        super().copy_in(to._replace(nbytes=to.nbytes - 1), source[:-1])


def test_copies_that_lose_a_byte_are_found(monkeypatch):
    device = SimDevice()
    assert copies_are_right(device)
    device.detector.check()
    monkeypatch.setattr("cache.device.sim.SimStream", _LossyStream)
    results = {copies_are_right(device) for _ in range(4)}  # a byte in 256 is zero anyway
    assert False in results
    device.close()
