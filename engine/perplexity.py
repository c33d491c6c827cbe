"""How well a model predicts text, computed by the engine itself: what a format costs in quality."""

from __future__ import annotations

import math
import pydoc_data.topics
from collections.abc import Sequence
from pathlib import Path

import msgspec
import torch
from torch import Tensor

from engine.config import EngineConfig
from engine.convert import Progress
from engine.engine import Engine
from engine.errors import ConfigError
from engine.sampling_params import SamplingParams
from engine.tokenizer import Tokenizer


class PerplexityResult(msgspec.Struct, frozen=True, kw_only=True):
    """exp of the mean negative log-likelihood of every token but the first of each window."""

    perplexity: float
    num_tokens: int  # that were predicted
    num_windows: int


def read_text(paths: Sequence[Path]) -> str:
    """The files one after the other; with none, the topics of Python's own `help()`. Raises `ConfigError`."""
    if not paths:
        topics = pydoc_data.topics.topics
        return "\n\n".join(topics[name] for name in sorted(topics))
    try:
        return "\n\n".join(path.read_text(encoding="utf-8") for path in paths)
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"cannot read text: {error}") from error


def bench_perplexity(
    config: EngineConfig,
    paths: Sequence[Path],
    *,
    window: int = 512,
    max_windows: int | None = None,
    progress: Progress | None = None,
) -> PerplexityResult:
    """Load a model and measure it on the text of these files; see `measure_perplexity` and `read_text`."""
    text = read_text(paths)
    engine = Engine(config, progress)
    try:
        return measure_perplexity(engine, text, window=window, max_windows=max_windows, progress=progress)
    finally:
        engine.close()


def measure_perplexity(
    engine: Engine,
    text: str,
    *,
    window: int = 512,
    max_windows: int | None = None,
    progress: Progress | None = None,
) -> PerplexityResult:
    """Score windows of `window` tokens, evenly spread over the text. Raises `ConfigError` if it is too short."""
    assert isinstance(engine.tokenizer, Tokenizer)
    token_ids = engine.tokenizer.encode(text)
    window = min(window, engine.info.max_model_len)
    num_windows = len(token_ids) // window
    if num_windows == 0:
        raise ConfigError(f"the text has {len(token_ids)} tokens; at least {window} are needed")
    chosen = num_windows if max_windows is None else min(max_windows, num_windows)
    total, num_tokens = 0.0, 0
    for i in range(chosen):
        start = i * num_windows // chosen * window
        log_likelihoods = score(engine, token_ids[start : start + window])
        total += float(log_likelihoods.double().sum())
        num_tokens += len(log_likelihoods)
        if progress is not None:
            progress("scoring", i + 1, chosen)
    return PerplexityResult(perplexity=math.exp(-total / num_tokens), num_tokens=num_tokens, num_windows=chosen)


def score(engine: Engine, token_ids: list[int]) -> Tensor:
    """Natural-log likelihood of each token but the first, float32 [T - 1]; no prefix is taken from the cache.

    The engine must be idle. Raises `InvalidRequest` for token ids that cannot be a prompt.
    """
    if engine.has_work:
        raise RuntimeError("only an idle engine can score")
    engine.add_request("score", token_ids, SamplingParams(temperature=0.0, max_tokens=0, prompt_logprobs=0))
    logprobs: list[float] = []
    error: str | None = None
    while engine.has_work:
        for output in engine.step():
            logprobs += [position.chosen.logprob for position in output.prompt_logprobs or ()]
            error = error or output.error
    if error is not None:
        raise RuntimeError(error)
    return torch.tensor(logprobs[1:])
