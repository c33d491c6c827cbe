from __future__ import annotations

from pathlib import Path

import pytest
import torch

from cache.device.device import Region
from cache.device.sim import Adversary, SimDevice, SimStream
from engine.doctor import copies_are_right, examine, link, numerics
from kernels.backend import BACKENDS
from kernels.quant.formats import FORMATS
from kernels.torch_backend import TorchBackend


@pytest.fixture(scope="module")
def findings(tmp_path_factory: pytest.TempPathFactory):
    return {finding.name: finding for finding in examine(Path(tmp_path_factory.mktemp("near")))}


def test_everything_is_looked_at_and_what_is_here_is_well(findings):
    assert {"software", "CPU", "memory", "disk", "locked memory", "native kernels", "GPU driver", "GPU"} <= set(
        findings
    )
    assert not [finding for finding in findings.values() if finding.verdict == "bad"]
    assert f"torch {torch.__version__.partition('+')[0]}" in findings["software"].text
    assert all(format in findings["native kernels"].text for format in FORMATS)


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
