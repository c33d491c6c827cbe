"""Chats of the dense model, written by our own engine: prompts that people write, and prompts that it writes itself.

A chat model asked to begin with the user's turn invents a prompt (Magpie, arXiv 2406.08464), so prompts are as diverse
as what it was made for.
"""

from __future__ import annotations

import random
import tempfile
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from engine.config import CacheConfig, EngineConfig, SchedulerConfig
from engine.engine import Engine
from engine.refactor import corpus
from engine.refactor.plan import LayerPlan, RefactorPlan, SplitSettings
from engine.refactor.source import DenseSource, fingerprint
from engine.refactor.write import write_checkpoint
from engine.sampling_params import SamplingParams

NUM_INVENTED = 1300
ANSWER_LENGTH = 192  # tokens
_PROMPT_LENGTH = 60  # tokens
_NUM_HELD_OUT_INVENTED = 24
_TEMPERATURE = 0.8
_KV_NBYTES = 4 << 30
_CHARACTERS = range(9, 400)  # of a prompt that is kept
# how an invented prompt begins; empty ones are the model's own idea, the others spread them
_BEGINNINGS = (
    *[""] * 4, "How", "What", "Write", "Explain", "Can you", "Why", "I", "Create", "Give", "Describe", "List",
    "Tell me", "Who", "Is", "Which", "Summarize", "def", "Translate", "Compare", "Suggest", "When",
)  # fmt: skip

Progress = Callable[[str, int, int], None]


@dataclass(frozen=True, slots=True)
class Chats:
    """Token ids of prompts in the chat template, and of the answers to them, an eos at their end unless cut."""

    prompts: list[list[int]]
    answers: list[list[int]]


def write_chats(
    source: DenseSource,
    prompts: Sequence[str],
    *,
    never: Collection[str] = (),
    num_invented: int = NUM_INVENTED,
    seed: int = 0,
    progress: Progress,
) -> tuple[Chats, Chats]:
    """-> chats to learn from, and chats to be judged by: one in six of `prompts` and some invented ones.

    These are answered greedily, the others greedily and at a temperature in turn. No invented prompt is one of
    `never`. Raises `ConfigError` when the model has no chat template.
    """
    tokenizer = corpus.load_tokenizer(source)
    with tempfile.TemporaryDirectory(prefix="foregate-") as directory:
        path = Path(directory) / "dense"
        write_checkpoint(source, _whole_plan(source), path)
        engine = Engine(
            EngineConfig(
                model=path,
                dtype="bfloat16",
                kv_memory_nbytes=_KV_NBYTES,
                cache=CacheConfig(format="bf16"),
                scheduler=SchedulerConfig(max_num_seqs=64, max_num_batched_tokens=1024, max_num_waiting=1 << 20),
            )
        )
        try:
            kept_apart = {prompt.lower() for prompt in never}
            invented = [
                prompt
                for prompt in _invent(engine, tokenizer, num_invented, seed, progress)
                if prompt.lower() not in kept_apart
            ]
            held = [p for i, p in enumerate(prompts) if corpus.held_out(i)] + invented[:_NUM_HELD_OUT_INVENTED]
            learned = [p for i, p in enumerate(prompts) if not corpus.held_out(i)] + invented[_NUM_HELD_OUT_INVENTED:]
            ids = corpus.chat_prompts([*held, *learned], tokenizer)
            answers = _run(
                engine,
                ids,
                [
                    SamplingParams(
                        temperature=_TEMPERATURE if i >= len(held) and i % 2 else 0.0, max_tokens=ANSWER_LENGTH, seed=i
                    )
                    for i in range(len(ids))
                ],
                lambda done, total: progress("answers", done, total),
            )
        finally:
            engine.close()
    first = len(held)
    return Chats(ids[first:], answers[first:]), Chats(ids[:first], answers[:first])


def _whole_plan(source: DenseSource) -> RefactorPlan:
    """One expert that is always active: the dense model."""
    config = source.config
    layers = [
        LayerPlan(torch.arange(config.intermediate_size), torch.zeros(1, config.hidden_size), torch.zeros(1))
        for _ in range(config.num_hidden_layers)
    ]
    settings = SplitSettings(num_experts=1, shared_size=config.intermediate_size // 2, num_active=1)
    return RefactorPlan(settings=settings, source_sha256=fingerprint(source), layers=layers)


def _invent(engine: Engine, tokenizer: Any, count: int, seed: int, progress: Progress) -> list[str]:
    """Distinct prompts, at most `count`: those that ended by themselves and are neither tiny nor long."""
    mark = "X"
    template = tokenizer.apply_chat_template(
        [{"role": "user", "content": mark}], add_generation_prompt=True, tokenize=False
    )
    before = template[: template.rindex(mark)]
    end = template[template.rindex(mark) + 1 :].lstrip()
    stop_ids = set(tokenizer.encode(end, add_special_tokens=False)[:1])
    generator = random.Random(seed)
    begun = [generator.choice(_BEGINNINGS) for _ in range(count)]
    ids = [tokenizer.encode(before + text, add_special_tokens=False) for text in begun]
    params = [SamplingParams(temperature=_TEMPERATURE, max_tokens=_PROMPT_LENGTH, seed=seed + i) for i in range(count)]
    written = _run(engine, ids, params, lambda done, total: progress("prompts", done, total))
    prompts = [
        (text + tokenizer.decode(rest[:-1])).strip()
        for text, rest in zip(begun, written, strict=True)
        if rest and rest[-1] in stop_ids
    ]
    return [text for text in dict.fromkeys(prompts) if len(text) in _CHARACTERS]


def _run(
    engine: Engine, prompts: list[list[int]], params: list[SamplingParams], progress: Callable[[int, int], None]
) -> list[list[int]]:
    answers: list[list[int]] = [[] for _ in prompts]
    for i, (prompt, one) in enumerate(zip(prompts, params, strict=True)):
        engine.add_request(str(i), prompt, one)
    done = 0
    while engine.has_work:
        for output in engine.step():
            answers[int(output.request_id)] += output.token_ids
            if output.finish_reason is not None:
                done += 1
                progress(done, len(prompts))
    return answers
