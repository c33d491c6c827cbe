"""Text as token sequences: what calibration learns from and what perplexity is measured on."""

from __future__ import annotations

import pydoc_data.topics
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from engine.errors import CheckpointError, ConfigError
from engine.refactor.source import DenseSource

_HELD_OUT_EVERY = 6  # one document or prompt in six is never learned from


@dataclass(frozen=True, slots=True)
class Passages:
    """Sequences of equal length; `scored` marks the tokens, from the second on, whose likelihood counts."""

    name: str
    tokens: Tensor  # [B, T] int64
    scored: Tensor  # [B, T - 1] bool

    def sample(self, num_seqs: int, seed: int) -> Passages:
        """`num_seqs` sequences at random, all of them where there are fewer."""
        chosen = torch.randperm(len(self.tokens), generator=torch.Generator().manual_seed(seed))[:num_seqs]
        return Passages(self.name, self.tokens[chosen], self.scored[chosen])


def load_tokenizer(source: DenseSource) -> Any:
    """The source's own tokenizer (a transformers tokenizer). Raises `CheckpointError`."""
    from transformers import AutoTokenizer

    with tempfile.TemporaryDirectory(prefix="foregate-") as directory:
        source.write_tokenizer(Path(directory))
        try:
            return AutoTokenizer.from_pretrained(directory, local_files_only=True)
        except (OSError, ValueError) as error:
            raise CheckpointError(f"{source.path} has no usable tokenizer: {error}") from error


def python_topics() -> list[str]:
    """The prose that comes with every Python: the topics of its `help()`."""
    return [pydoc_data.topics.topics[name] for name in sorted(pydoc_data.topics.topics)]


def read_documents(paths: Sequence[Path]) -> list[str]:
    """Text files, cut into documents at blank lines so that a part can be held out. Raises `ConfigError`."""
    documents: list[str] = []
    for path in paths:
        try:
            paragraphs = [p for p in path.read_text(encoding="utf-8").split("\n\n") if p.strip()]
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"cannot read calibration text {path}: {error}") from error
        documents += ["\n\n".join(paragraphs[i : i + 20]) for i in range(0, len(paragraphs), 20)]
    return documents


def held_out(index: int) -> bool:
    """Whether the document or prompt of that number is for measuring, not for learning."""
    return index % _HELD_OUT_EVERY == 0


def prose(name: str, documents: Sequence[str], tokenizer: Any, length: int) -> Passages:
    """Documents end to end, an eos after each, cut into sequences of `length`. Raises `ConfigError` if too short."""
    end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    return packed(
        name,
        [[*tokenizer.encode(text, add_special_tokens=False, verbose=False), *end] for text in documents],
        length,
    )


def packed(name: str, pieces: Sequence[Sequence[int]], length: int) -> Passages:
    """Token ids end to end, cut into sequences of `length`; all count. Raises `ConfigError` if they fill none."""
    ids = [token for piece in pieces for token in piece]
    num_seqs = len(ids) // length
    if num_seqs == 0:
        raise ConfigError(f"{name}: {len(ids)} tokens are too few, at least {length} are needed")
    tokens = torch.tensor(ids[: num_seqs * length]).view(num_seqs, length)
    return Passages(name, tokens, torch.ones(num_seqs, length - 1, dtype=torch.bool))


def chat_prompts(prompts: Sequence[str], tokenizer: Any) -> list[list[int]]:
    """Each prompt as a user's turn in the model's chat template. Raises `ConfigError` when it has none."""
    if tokenizer.chat_template is None:
        raise ConfigError("the model has no chat template, so it cannot write chats to calibrate on")
    return [
        list(
            tokenizer.apply_chat_template(
                [{"role": "user", "content": prompt}], add_generation_prompt=True, tokenize=True, return_dict=False
            )
        )
        for prompt in prompts
    ]


def chats(name: str, prompts: Sequence[Sequence[int]], answers: Sequence[Sequence[int]]) -> Passages:
    """One chat per sequence, padded at the end; only the answers count."""
    length = max(len(p) + len(a) for p, a in zip(prompts, answers, strict=True))
    tokens = torch.zeros(len(prompts), length, dtype=torch.int64)
    scored = torch.zeros(len(prompts), length - 1, dtype=torch.bool)
    for row, (prompt, answer) in enumerate(zip(prompts, answers, strict=True)):
        end = len(prompt) + len(answer)
        tokens[row, :end] = torch.tensor([*prompt, *answer])
        scored[row, len(prompt) - 1 : end - 1] = True
    return Passages(name, tokens, scored)
