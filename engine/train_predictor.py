"""Learns the probe, a linear map from a layer's router input to the later layers' choices, and the path router."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from engine.batch import Batch
from engine.checkpoint import Checkpoint
from engine.config import EngineConfig
from engine.convert import Progress
from engine.engine import Engine
from engine.errors import ConfigError
from engine.foresight import gate_weights
from engine.layers.foresight import MAX_DISTANCE
from engine.learn_path import learn_path
from engine.path_router import embedding_of, path_router_path, save_path_router
from engine.probe_file import probe_path, save_probe
from engine.sampling_params import SamplingParams
from engine.tokenizer import Tokenizer
from kernels.backend import Routing

PROMPTS_PATH = Path(__file__).parent / "refactor" / "data" / "prompts.txt"
MAX_TOKENS = 16_384
_ANSWER_LENGTH = 96  # tokens
_HELD_OUT = 8  # one request in so many
_RIDGE = 0.02  # of the mean square of an input


class ProbeRecall(NamedTuple):
    """Share of the routed experts among as many foretold, on requests that nothing was learned from."""

    distance: int
    stale_gate: float
    probe: float


class Learned(NamedTuple):
    """Where the predictors lie, and how well they foretell."""

    paths: list[Path]
    probe: list[ProbeRecall]
    path: float  # of all layers, from the token ids alone


@dataclass(slots=True)
class _Rows:
    """What the layers saw: one observer of an engine."""

    num_layers: int
    max_tokens: int
    inputs: list[list[Tensor]]  # of each layer [T, H] bf16
    chosen: list[list[Tensor]]  # of each layer [T, k]
    requests: list[int]
    token_ids: list[int]

    @classmethod
    def of(cls, num_layers: int, max_tokens: int) -> _Rows:
        return cls(num_layers, max_tokens, [[] for _ in range(num_layers)], [[] for _ in range(num_layers)], [], [])

    @property
    def is_full(self) -> bool:
        return len(self.requests) >= self.max_tokens

    def step_begins(self, batch: Batch) -> None:
        self.requests += batch.requests
        self.token_ids += batch.token_ids.tolist()

    def layer_begins(self, index: int, x: Tensor, routing: Routing, batch: Batch) -> None:
        self.inputs[index].append(x.to(torch.bfloat16))
        self.chosen[index].append(routing.ids.clone())

    def step_ends(self) -> None:
        """Nothing: a step that fails is not learned from, since training stops."""

    def request_ends(self, number: int) -> None:
        """Nothing: its rows stay."""


def train_predictor(
    config: EngineConfig,
    *,
    prompts: Sequence[str] = (),
    max_tokens: int = MAX_TOKENS,
    seed: int = 0,
    progress: Progress | None = None,
) -> Learned:
    """Let the model answer prompts, fit the probe and the path router to its routing, keep them beside the experts.

    `prompts`: texts; if there are none, those that come with Foregate. Raises `ConfigError` for a model that has no
    layers to foretell.
    """
    config = config.resolved(has_experts=True)
    checkpoint = Checkpoint(config.model)
    spec = checkpoint.spec
    moe = spec.moe
    if moe is None or len(moe.layers) < 2:
        raise ConfigError("this model has no two layers with experts: there is nothing to foretell")
    rows = _Rows.of(len(moe.layers), max_tokens)
    _answer(replace(config, cache=replace(config.cache, predictor="off")), rows, prompts, seed, progress)
    inputs = [torch.cat(parts)[:max_tokens] for parts in rows.inputs]
    chosen = [torch.cat(parts)[:max_tokens].long() for parts in rows.chosen]
    is_held_out = torch.tensor([request % _HELD_OUT == 0 for request in rows.requests[:max_tokens]])
    if is_held_out.all() or not is_held_out.any():
        raise ConfigError(f"too few prompts: give at least {_HELD_OUT} to learn from")
    maps: list[tuple[Tensor, Tensor]] = []
    stale, biases = gate_weights(spec, moe, checkpoint)
    counts = {d: np.zeros(3) for d in range(1, MAX_DISTANCE + 1)}  # uses, found by the stale gate, by the probe
    for index in range(len(moe.layers) - 1):
        targets = range(index + 1, min(len(moe.layers), index + 1 + MAX_DISTANCE))
        wanted = [_one_hot(chosen[target], moe.num_experts) for target in targets]
        x = inputs[index].float()
        weight, bias = _fit(x[~is_held_out], torch.cat([w[~is_held_out] for w in wanted], dim=1))
        maps.append((weight, bias))
        judged = x[is_held_out]
        found = (judged @ weight.T + bias).view(len(judged), len(targets), -1)
        for i, target in enumerate(targets):
            gate = judged @ stale[target].T + biases[target]
            truth = wanted[i][is_held_out]
            hits = [truth.gather(1, s.topk(moe.num_active).indices).sum().item() for s in (gate, found[:, i])]
            counts[target - index] += (truth.sum().item(), *hits)
        if progress is not None:
            progress("fitting layers", index + 1, len(moe.layers) - 1)
    path = probe_path(config.cache, checkpoint)
    save_probe(path, checkpoint, maps)
    tensors, recall = learn_path(
        embedding_of(checkpoint),
        rows.token_ids[:max_tokens],
        rows.requests[:max_tokens],
        torch.stack(chosen, dim=1),
        is_held_out,
        moe.num_experts,
        seed=seed,
        progress=None if progress is None else partial(progress, "learning the path router"),
    )
    router_path = path_router_path(config.cache, checkpoint)
    save_path_router(router_path, checkpoint, tensors)
    recalls = [ProbeRecall(d, c[1] / c[0], c[2] / c[0]) for d, c in counts.items() if c[0]]
    return Learned([path, router_path], recalls, recall)


def _answer(config: EngineConfig, rows: _Rows, prompts: Sequence[str], seed: int, progress: Progress | None) -> None:
    texts = list(prompts) or PROMPTS_PATH.read_text(encoding="utf-8").splitlines()
    random.Random(seed).shuffle(texts)
    tokenizer = Tokenizer(config.model)
    engine = Engine(config, progress, tokenizer=tokenizer, observer=rows)
    try:
        for i, text in enumerate(texts):
            chat = [{"role": "user", "content": text}]
            prompt = tokenizer.render_chat(chat) if tokenizer.has_chat_template else tokenizer.encode(text)
            params = SamplingParams(temperature=0.8, max_tokens=_ANSWER_LENGTH, seed=seed + i)
            engine.add_request(str(i), prompt[: engine.info.max_model_len - _ANSWER_LENGTH], params)
            while len(list(engine.scheduler.requests)) >= config.scheduler.max_num_seqs:
                engine.step()
            if rows.is_full:
                break
            if progress is not None:
                progress("tokens recorded", min(len(rows.requests), rows.max_tokens), rows.max_tokens)
        while engine.has_work and not rows.is_full:
            engine.step()
    finally:
        engine.close()


def _one_hot(ids: Tensor, num_experts: int) -> Tensor:
    return torch.zeros(len(ids), num_experts).scatter_(1, ids, 1.0)


def _fit(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """Ridge regression: x [N, H], y [N, M] -> weight [M, H], bias [M]."""
    x_mean, y_mean = x.mean(0), y.mean(0)
    centred = x - x_mean
    squares = centred.T @ centred
    squares.diagonal().add_(_RIDGE * squares.diagonal().mean())
    weight = torch.cholesky_solve(centred.T @ (y - y_mean), torch.linalg.cholesky(squares)).T.contiguous()
    return weight, y_mean - weight @ x_mean
