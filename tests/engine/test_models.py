"""Every family against transformers' own class: logits, greedy tokens, whatever the chunks and the prefix cache do."""

from __future__ import annotations

import random

import pytest
import torch

from engine.checkpoint import Checkpoint
from engine.loader import load_decoder
from engine.models import FAMILIES
from engine.request import Request
from engine.scheduler import SchedulerOutput
from kernels.torch_backend import TorchBackend
from tests.engine.conftest import greedy, run_all, tokens_of
from tests.engine.tiny_models import VARIANTS, VOCAB_SIZE, reference_greedy, reference_logits


def random_prompt(length: int, seed: int = 0) -> list[int]:
    return random.Random(seed).choices(range(VOCAB_SIZE), k=length)


def all_logits(engine, prompt: list[int], chunk: int) -> torch.Tensor:
    """Logits of every prompt token, computed in chunks."""
    engine.add_request("x", prompt, greedy(1))
    request: Request = next(engine.scheduler.requests)
    parts = []
    while request.num_computed_tokens < len(prompt):
        engine._blocks.allocate(request, len(prompt))
        output = SchedulerOutput({request: min(chunk, request.num_new_tokens)})
        parts.append(engine._runner.run(output, all_logits=True))
        engine.scheduler.update(output)
    engine.abort_request("x")
    return torch.cat(parts)


def test_every_family_of_the_table_has_a_variant_here():
    made = {variant.split("-")[0] for variant in VARIANTS}
    assert {family.removesuffix("_moe") for family in FAMILIES if family != "foregate_llama_moe"} == made


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("chunk", [1, 7, 1000])
def test_logits_equal_those_of_transformers(checkpoint, make_engine, variant, chunk):
    directory, model = checkpoint(variant)
    prompt = random_prompt(75)
    logits = all_logits(make_engine(directory), prompt, chunk)
    expected = reference_logits(model, prompt)
    assert expected.std() > 0.1  # not a degenerate model, or the bound below says nothing
    torch.testing.assert_close(logits, expected, atol=1e-3, rtol=0)


def test_four_bits_are_for_attention_and_eight_for_other_dense_layers(checkpoint):
    made = []

    class Recorder(TorchBackend):
        def make_linear(self, weight, bias, format):
            made.append((tuple(weight.shape), format))
            return super().make_linear(weight, bias, format)

    opened = Checkpoint(checkpoint("llama-llama3-rope")[0])
    spec = opened.spec
    load_decoder(opened, spec, "int4", 64, Recorder(), None)
    hidden, inner = spec.hidden_size, opened.config["intermediate_size"]
    heads, kv_heads = spec.num_heads * spec.head_dim, spec.num_kv_heads * spec.head_dim
    layer = [
        ((heads + 2 * kv_heads, hidden), "int4"),
        ((hidden, heads), "int4"),
        ((2 * inner, hidden), "int8"),
        ((hidden, inner), "int8"),
    ]
    assert made == layer * spec.num_layers + [((spec.vocab_size, hidden), "int8")]


@pytest.mark.parametrize("variant", VARIANTS)
def test_64_greedy_tokens_equal_those_of_transformers(checkpoint, make_engine, variant):
    directory, model = checkpoint(variant)
    prompt = random_prompt(20, seed=1)
    engine = make_engine(directory, scheduler={"max_num_batched_tokens": 32})
    first = run_all(engine, {"a": (prompt, greedy(64))})["a"]
    expected = reference_greedy(model, prompt, 64)
    assert len(set(expected)) > 8  # not stuck in a loop of few tokens
    assert tokens_of(first) == expected
    assert first[-1].finish_reason == "length"
    again = run_all(engine, {"b": (prompt, greedy(64))})["b"]  # now with a prefix hit
    assert again[-1].num_cached_tokens == 16
    assert tokens_of(again) == expected


@pytest.mark.parametrize("variant", ["mixtral", "olmoe", "qwen3"])
def test_a_preempted_request_resumes_with_the_tokens_of_transformers(checkpoint, make_engine, variant):
    directory, model = checkpoint(variant)
    prompts = {f"r{i}": random_prompt(24, seed=i) for i in range(6)}
    probe = make_engine(directory)
    block_nbytes = 16 * 1024**2 // probe._blocks.num_blocks
    engine = make_engine(directory, max_model_len=96, kv_memory_nbytes=14 * block_nbytes)
    outputs = run_all(engine, {name: (prompt, greedy(40)) for name, prompt in prompts.items()})
    assert engine.stats().preemptions_total > 0
    for name, prompt in prompts.items():
        assert tokens_of(outputs[name]) == reference_greedy(model, prompt, 40), name


@pytest.mark.parametrize("variant", ["mixtral", "olmoe", "qwen3"])
def test_32_concurrent_requests_get_the_tokens_that_each_gets_alone(checkpoint, make_engine, variant):
    directory, _ = checkpoint(variant)
    requests = {f"r{i}": (random_prompt(3 + 5 * i, seed=i), greedy(8 + i % 17)) for i in range(32)}
    engine = make_engine(directory, scheduler={"max_num_batched_tokens": 64})
    together = run_all(engine, requests)
    for name, request in requests.items():
        alone = run_all(make_engine(directory), {name: request})
        assert tokens_of(together[name]) == tokens_of(alone[name]), name
