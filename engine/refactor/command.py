"""`foregate refactor`: a dense checkpoint in, a MoE checkpoint directory and a report out."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from engine.errors import CheckpointError, ConfigError
from engine.refactor import corpus
from engine.refactor.calibrate import learn_plan
from engine.refactor.perplexity import Perplexity, perplexities
from engine.refactor.plan import RefactorPlan, SplitSettings
from engine.refactor.source import open_source
from engine.refactor.write import Progress, write_checkpoint
from kernels.quant.formats import SIZE_MULTIPLE

SEQUENCE_LENGTH = 512
NUM_CALIBRATION_SEQS = 64  # 32,768 tokens
NUM_HELD_OUT_SEQS = 16


@dataclass(frozen=True, slots=True, kw_only=True)
class RefactorReport:
    """What came out. `perplexities` are measured on text that was not learned from."""

    out: Path
    perplexities: list[Perplexity]
    active_share: float  # of the FFN's neurons, per token
    seconds: float


def refactor(
    source: Path,
    out: Path,
    *,
    num_experts: int = 16,
    shared_size: int = 512,
    num_active: int = 12,
    calibration: Sequence[Path] | None = None,
    plan: Path | None = None,
    save_plan: Path | None = None,
    dtype: str = "bfloat16",
    seed: int = 0,
    progress: Progress = lambda what, done, total: None,
) -> RefactorReport:
    """Split the dense Llama `source` (a checkpoint directory or a .gguf file) and write the MoE to `out`.

    calibration: text files to learn from, best such as the model will be asked about; None: the help texts of
    Python. plan: use this one instead of learning (its settings win over the sizes given here). save_plan: keep what
    was learned. Raises `CheckpointError` and `ConfigError` before anything is written to `out`.
    """
    start = time.monotonic()
    if out.exists():
        raise CheckpointError(f"{out} exists; remove it or choose another place")
    opened = open_source(source)
    given = RefactorPlan.load(plan) if plan is not None else None
    settings = (
        given.settings
        if given is not None
        else SplitSettings(num_experts=num_experts, shared_size=shared_size, num_active=num_active)
    )
    _check_served_sizes(settings.expert_size(opened.config.intermediate_size), opened.config.hidden_size)
    documents = corpus.python_topics() if calibration is None else corpus.read_documents(calibration)
    tokenizer = corpus.load_tokenizer(opened)
    length = min(SEQUENCE_LENGTH, opened.config.max_position_embeddings)
    judged = corpus.prose("held-out text", _part(documents, held_out=True), tokenizer, length)
    judged = judged.sample(NUM_HELD_OUT_SEQS, seed)
    if given is not None:
        learned = given
    else:
        texts = corpus.prose("calibration text", _part(documents, held_out=False), tokenizer, length)
        texts = texts.sample(NUM_CALIBRATION_SEQS, seed)
        learned, _ = learn_plan(opened, [texts], settings, lambda done, total: progress("calibrate", done, total), seed)
        if save_plan is not None:
            save_plan.write_bytes(learned.to_bytes())
    write_checkpoint(opened, learned, out, dtype=dtype, progress=progress)
    measured = perplexities(opened, learned, [judged], lambda done, total: progress("measure", done, total))
    return RefactorReport(
        out=out,
        perplexities=measured,
        active_share=settings.active_share(opened.config),
        seconds=time.monotonic() - start,
    )


def _check_served_sizes(expert_size: int, hidden_size: int) -> None:
    """Raises `ConfigError` if the kernels could not compute the experts; before an hour of calibration, not after."""
    if expert_size % SIZE_MULTIPLE:
        raise ConfigError(
            f"experts of {expert_size} neurons cannot be served; choose num_experts and shared_size so that each has a "
            f"multiple of {SIZE_MULTIPLE}"
        )
    if hidden_size % SIZE_MULTIPLE:
        raise ConfigError(f"a hidden size of {hidden_size} cannot be served: it is no multiple of {SIZE_MULTIPLE}")


def _part(documents: Sequence[str], *, held_out: bool) -> list[str]:
    return [text for index, text in enumerate(documents) if corpus.held_out(index) == held_out]
