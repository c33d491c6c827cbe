"""The engine put together as for a GPU, without one: tensors that do not mix with the host's, interpreted kernels."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from cache.device.sim import Adversary, SimDevice
from engine.config import CacheConfig, EngineConfig
from engine.engine import Engine
from engine.errors import ConfigError
from engine.sampling_params import SamplingParams
from kernels.gpu.backend import TritonBackend
from kernels.quant.formats import FORMATS
from tests.engine.conftest import greedy, run_all, tokens_of
from tests.engine.elsewhere import ELSEWHERE, Elsewhere, ElsewhereDevice, elsewhere
from tests.engine.tiny_models import make_checkpoint

RECORD = FORMATS["int4"].layout(64, 96).nbytes
ADVERSARY = Adversary(seed=1, copy_delay_s=0.001, num_pieces=2)
REQUESTS = {"a": ([7, 3, 9, 250, 3, 14, 15, 9, 2, 6, 5], greedy(3, logprobs=0)), "b": ([33, 66], greedy(2, logprobs=0))}


def config_of(directory: Path, **cache: object) -> EngineConfig:
    return EngineConfig(
        model=directory,
        dtype="int8",
        kv_memory_nbytes=4 * 1024**2,
        max_model_len=64,
        cache=CacheConfig(format="int4", **{"memory_nbytes": 5 * RECORD, **cache}),  # type: ignore[arg-type]
    )


def results(engine: Engine) -> dict[str, tuple[list[int], list[float]]]:
    outputs = run_all(engine, REQUESTS)
    logprobs = {
        name: [position.chosen.logprob for part in parts for position in part.logprobs or ()]
        for name, parts in outputs.items()
    }
    return {name: (tokens_of(parts), logprobs[name]) for name, parts in outputs.items()}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("mixtral")
    make_checkpoint(directory, "mixtral")
    return directory


@pytest.fixture(scope="module")
def expected(checkpoint: Path) -> dict[str, tuple[list[int], list[float]]]:
    """What Triton's kernels answer where all is in host memory."""
    engine = Engine(config_of(checkpoint, memory_nbytes=None), backend=TritonBackend())
    found = results(engine)
    engine.close()
    assert len(set(found["a"][0])) > 1
    return found


def test_on_the_simulated_device_tritons_kernels_give_the_same_bits(checkpoint: Path, expected):
    device = SimDevice(adversary=Adversary(seed=2, copy_delay_s=0.002, compute_delay_s=0.002, num_pieces=3))
    engine = Engine(config_of(checkpoint), backend=TritonBackend(), device=device)
    assert engine.stats().expert_cache.num_slots < 8
    assert results(engine) == expected
    engine.close()
    engine.check_integrity()
    device.detector.check()


def test_put_together_as_for_a_gpu_nothing_is_in_the_wrong_memory(checkpoint: Path, expected, monkeypatch):
    device = ElsewhereDevice(adversary=ADVERSARY)
    with elsewhere(monkeypatch):
        backend = TritonBackend(ELSEWHERE)
        engine = Engine(config_of(checkpoint), backend=backend, device=device)
        model = engine._runner.model
        assert model.backend is backend  # called, not put into a stream
        assert isinstance(model.embedding, Elsewhere)
        assert results(engine) == expected
        assert engine.stats().expert_cache.evictions > 0
        engine.close()
        engine.check_integrity()


def test_what_is_traced_scored_and_sampled_crosses_to_the_host(checkpoint: Path, tmp_path: Path, monkeypatch):
    device = ElsewhereDevice(adversary=ADVERSARY)
    trace = tmp_path / "trace.npz"
    asked = {"s": ([1, 2, 3, 4], SamplingParams(temperature=0.7, top_p=0.9, seed=3, max_tokens=2, prompt_logprobs=1))}
    found = []
    for is_gpu in (False, True):
        config = config_of(checkpoint)
        if not is_gpu:
            engine = Engine(config, backend=TritonBackend())
            outputs = run_all(engine, asked)
            engine.close()
        else:
            from dataclasses import replace

            with elsewhere(monkeypatch):
                engine = Engine(replace(config, record_trace=trace), backend=TritonBackend(ELSEWHERE), device=device)
                outputs = run_all(engine, asked)
                engine.close()
        scores = [position.chosen.logprob for part in outputs["s"] for position in part.prompt_logprobs or ()]
        found.append((tokens_of(outputs["s"]), scores[1:]))
    assert found[0] == found[1]
    assert trace.exists()


def test_cpu_experts_beside_a_gpu_are_computed_by_the_cpus_kernels(checkpoint: Path, monkeypatch):
    """All that can be, so that times decide nothing."""

    def able(missing, busy):
        return frozenset(i for i, one in enumerate(missing) if one.cpu_s < float("inf"))

    monkeypatch.setattr("cache.transfer.TransferEngine.bandwidth", 1e6)
    monkeypatch.setattr("engine.layers.cpu_experts.choose_cpu", able)
    device = ElsewhereDevice(adversary=ADVERSARY)
    with elsewhere(monkeypatch):
        config = config_of(checkpoint, cpu_experts=True, host_memory_nbytes=10**7, predictor="off")
        engine = Engine(config, backend=TritonBackend(ELSEWHERE), device=device)
        outputs = run_all(engine, {"b": ([33, 66], greedy(4))})
        assert outputs["b"][-1].finish_reason == "length"
        assert engine.stats().expert_cache.sources["cpu_compute"] > 0
        engine.close()
        engine.check_integrity()


def test_a_tensor_elsewhere_does_not_mix_with_the_hosts(monkeypatch):
    with elsewhere(monkeypatch):
        there, here = torch.ones(3, device=ELSEWHERE), torch.ones(3)
        assert isinstance(there + there, Elsewhere)
        assert (there + 1).tolist() == [2, 2, 2]
        assert type((there * 2).cpu()) is torch.Tensor
        with pytest.raises(RuntimeError, match="expected all tensors to be on the same device"):
            there + here
        with pytest.raises(TypeError, match="can't convert"):
            there.numpy()
        there[1:].copy_(here[1:] * 5)
        assert there.cpu().tolist() == [1, 5, 5]


def test_kernels_that_compute_where_the_experts_are_not_are_refused(checkpoint: Path, monkeypatch):
    from dataclasses import replace

    config = config_of(checkpoint)
    device = ElsewhereDevice()
    with pytest.raises(ConfigError, match="the native kernels compute on cpu, the experts are on meta: leave out"):
        Engine(replace(config, kernels="native"), device=device)
    device.close()
    with elsewhere(monkeypatch):
        monkeypatch.setattr("kernels.backend.BACKENDS", {"triton": lambda num_threads: TritonBackend(ELSEWHERE)})
        with pytest.raises(ConfigError, match="the experts are on cpu: name the device by --device meta"):
            Engine(replace(config, kernels="triton"))
