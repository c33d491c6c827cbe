"""`foregate refactor`: a dense checkpoint in, a MoE checkpoint directory and a report out."""

from __future__ import annotations

import logging
import shutil
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from cache.analysis import (
    Chosen,
    popularity,
    segment_cache_best_hit_rate,
    segment_routing_best_performance,
    specialisation,
)
from engine.errors import CheckpointError, ConfigError
from engine.refactor import corpus
from engine.refactor.calibrate import learn_plan
from engine.refactor.corpus import Passages
from engine.refactor.distil import DistilSettings, Text, distil
from engine.refactor.perplexity import Perplexity, perplexities
from engine.refactor.plan import RefactorPlan, SplitSettings
from engine.refactor.source import open_source
from engine.refactor.write import Progress, write_checkpoint
from kernels.quant.formats import SIZE_MULTIPLE

_log = logging.getLogger(__name__)

SEQUENCE_LENGTH = 512
NUM_CALIBRATION_SEQS = 64  # 32,768 tokens
NUM_HELD_OUT_SEQS = 16
LOCALITY_WINDOW = 16  # tokens
LOCALITY_RATIO = 2.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Locality:
    """How the experts are used on the text that was not learned from; see `cache.analysis`."""

    srp: float | None  # over LOCALITY_WINDOW tokens; None: all sequences are shorter
    sch: float  # over the same, with LOCALITY_RATIO times one token's experts
    specialisation: float  # of the domains, 0 with one
    popularity: NDArray[np.float64]  # share of the tokens that use each expert [split layers, experts]

    @classmethod
    def of(cls, by_domain: dict[str, list[Chosen]]) -> Locality:
        """Of routing by domain."""
        sequences = [chosen for some in by_domain.values() for chosen in some]
        long = any(len(chosen) >= LOCALITY_WINDOW for chosen in sequences)
        return cls(
            srp=segment_routing_best_performance(sequences, LOCALITY_WINDOW) if long else None,
            sch=segment_cache_best_hit_rate(sequences, LOCALITY_WINDOW, LOCALITY_RATIO),
            specialisation=specialisation(by_domain),
            popularity=popularity(sequences),
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class RefactorReport:
    """What came out. `perplexities` are measured on text that was not learned from."""

    out: Path
    perplexities: list[Perplexity]  # of each calibration text
    active_share: float  # of the FFNs' neurons, per token
    locality: Locality
    seconds: float


def refactor(
    source: Path,
    out: Path,
    *,
    num_experts: int = 16,
    shared_size: int = 512,
    num_active: int = 12,
    dense_layers: Sequence[int] = (),
    distil_tokens: int = 0,
    rank: int = 12,
    state: Path | None = None,
    calibration: Sequence[Path] | None = None,
    plan: Path | None = None,
    save_plan: Path | None = None,
    dtype: str = "bfloat16",
    seed: int = 0,
    progress: Progress = lambda what, done, total: None,
) -> RefactorReport:
    """Split the dense Llama `source` (a checkpoint directory or a .gguf file) and write the MoE to `out`.

    calibration: text files to learn from, a domain each, best such as the model will be asked about; None: the help
    texts of Python. distil_tokens: learn routers and changes of that rank from what the dense model says on so many
    tokens of them; hours for millions. state: a file that distillation writes now and then, and goes on from. plan: use
    this one instead of learning (its settings win over the sizes given here). save_plan: keep what was learned. Raises
    `CheckpointError` and `ConfigError` before anything is written to `out`.
    """
    start = time.monotonic()
    if out.exists():
        raise CheckpointError(f"{out} exists; remove it or choose another place")
    opened = open_source(source)
    given = RefactorPlan.load(plan) if plan is not None else None
    settings = (
        given.settings
        if given is not None
        else SplitSettings(
            num_experts=num_experts,
            shared_size=shared_size,
            num_active=num_active,
            dense_layers=tuple(sorted(set(dense_layers))),
        )
    )
    settings.split_layers(opened.config.num_hidden_layers)
    _check_served_sizes(settings.expert_size(opened.config.intermediate_size), opened.config.hidden_size)
    domains = (
        {"help texts of Python": corpus.python_topics()}
        if calibration is None
        else {str(path): corpus.read_documents([path]) for path in calibration}
    )
    tokenizer = corpus.load_tokenizer(opened)
    length = min(SEQUENCE_LENGTH, opened.config.max_position_embeddings)

    def passages(*, held_out: bool, num_seqs: int) -> list[Passages]:
        share = max(1, num_seqs // len(domains))
        return [
            corpus.prose(name, _part(documents, held_out=held_out), tokenizer, length).sample(share, seed)
            for name, documents in domains.items()
        ]

    judged = passages(held_out=True, num_seqs=NUM_HELD_OUT_SEQS)
    if given is not None:
        learned = given
    else:
        texts = passages(held_out=False, num_seqs=NUM_CALIBRATION_SEQS)
        learned, _ = learn_plan(opened, texts, settings, lambda done, total: progress("calibrate", done, total), seed)
        if distil_tokens:
            learned = distil(
                opened,
                learned,
                [Text(some) for some in passages(held_out=False, num_seqs=distil_tokens // length)],
                DistilSettings(num_tokens=distil_tokens, rank=rank, seed=seed),
                state=state,
                compiled=_can_compile(),
                progress=lambda done, total, divergence: progress("distil", done, total),
            )
        if save_plan is not None:
            save_plan.write_bytes(learned.to_bytes())
    write_checkpoint(opened, learned, out, dtype=dtype, progress=progress)
    measured = perplexities(opened, learned, judged, lambda done, total: progress("measure", done, total))
    return RefactorReport(
        out=out,
        perplexities=measured,
        active_share=settings.active_share(opened.config),
        locality=Locality.of({text.name: text.routing for text in measured}),
        seconds=time.monotonic() - start,
    )


def _can_compile() -> bool:
    found = shutil.which("c++") is not None or shutil.which("g++") is not None
    if not found:
        _log.warning("SLOW: there is no C++ compiler, so distillation takes about twice as long")
    return found


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
