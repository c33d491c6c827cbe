"""Distillation: routers, low-rank changes and norms of a split model learn what the dense one says. Resumable."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor

from engine.errors import CheckpointError, ConfigError
from engine.refactor.corpus import Passages
from engine.refactor.plan import RefactorPlan
from engine.refactor.source import DenseSource
from engine.refactor.student import Student

_UNSCORED_WEIGHT = 0.3  # of positions that are not scored: a chat's prompt teaches too, but less
_SAVED_EVERY = 50  # steps
_LAST_RATE = 0.03  # of the learning rates, at the end of the cosine

Progress = Callable[[int, int, float], None]  # steps done, steps in all, the divergence lately in nats


@dataclass(frozen=True, slots=True, kw_only=True)
class DistilSettings:
    """How long and how fast to learn."""

    num_tokens: int = 2_000_000
    batch_size: int = 8  # sequences
    rank: int = 12  # of the changes to each product
    factor_rate: float = 4e-4
    router_rate: float = 4e-4
    norm_rate: float = 4e-4
    warm_up: int = 10  # steps
    temperature: float = 0.3  # of the routers' slope, in units of their logits
    balance: float = 0.01  # weight of the experts' unevenness over the batch: whole texts may prefer some
    seed: int = 0

    def __post_init__(self) -> None:
        if self.batch_size < 1 or self.rank < 1 or self.num_tokens < 1:
            raise ConfigError("distillation needs at least one token, one sequence in a batch and rank 1")


@dataclass(frozen=True, slots=True)
class Text:
    """What is learned from, and how often a sequence of it comes up beside those of other texts."""

    passages: Passages
    share: float = 1.0


def distil(
    source: DenseSource,
    plan: RefactorPlan,
    texts: Sequence[Text],
    settings: DistilSettings,
    *,
    state: Path | None = None,
    compiled: bool = True,
    progress: Progress = lambda done, total, divergence: None,
) -> RefactorPlan:
    """`plan` with routers distilled and healing added, by the mean KL divergence from the dense model on `texts`.

    All texts have sequences of one length. `state`: a file that is written now and then and gone on from if it is
    there and of the same task. Memory: the model twice and one batch's activations. Raises `ConfigError`.
    """
    lengths = {text.passages.tokens.shape[1] for text in texts}
    if len(lengths) != 1:
        raise ConfigError(f"texts to distil on must have sequences of one length, got {sorted(lengths)}")
    student = Student(
        source, plan, rank=settings.rank, temperature=settings.temperature, seed=settings.seed, compiled=compiled
    )
    run = _Run(student, texts, settings, _task_of(plan, texts, settings))
    if state is not None:
        run.resume(state)
    while run.step < run.num_steps:
        run.learn()
        if state is not None and (run.step % _SAVED_EVERY == 0 or run.step == run.num_steps):
            run.save(state)
        progress(run.step, run.num_steps, run.recent)
    return student.plan()


class _Run:
    def __init__(self, student: Student, texts: Sequence[Text], settings: DistilSettings, task: str) -> None:
        self._student, self._settings, self._task = student, settings, task
        self._groups = student.learning()
        self._rates = {
            "factors": settings.factor_rate,
            "routers": settings.router_rate,
            "norms": settings.norm_rate,
        }
        self._optimizer = torch.optim.AdamW(
            [{"params": tensors} for tensors in self._groups.values()], betas=(0.9, 0.98), weight_decay=0.0
        )
        self._texts = texts
        self._shares = torch.tensor([text.share for text in texts])
        self._generator = torch.Generator().manual_seed(settings.seed)
        self._orders = [torch.randperm(len(text.passages.tokens), generator=self._generator) for text in texts]
        self._taken = [0] * len(texts)
        length = texts[0].passages.tokens.shape[1]
        self.num_steps = max(1, settings.num_tokens // (settings.batch_size * length))
        self.step = 0
        self.recent = math.nan  # divergence, a running mean

    def learn(self) -> None:
        """One step."""
        settings, step = self._settings, self.step
        cosine = 0.5 * (1 + math.cos(math.pi * step / self.num_steps))
        rate = min(1.0, (step + 1) / settings.warm_up) * (_LAST_RATE + (1 - _LAST_RATE) * cosine)
        for group, name in zip(self._optimizer.param_groups, self._groups, strict=True):
            group["lr"] = rate * self._rates[name]
        tokens, weight = self._batch()
        hidden = self._student.prefix(tokens)
        wanted = self._student.teach(hidden)
        states, unevenness = self._student.run(hidden)
        divergence, loss = self._student.divergence(states.flatten(0, 1), wanted.flatten(0, 1), weight.flatten())
        (loss + settings.balance * unevenness).backward()
        torch.nn.utils.clip_grad_norm_([t for tensors in self._groups.values() for t in tensors], 1.0)
        self._optimizer.step()
        self._optimizer.zero_grad()
        self.step += 1
        self.recent = divergence if math.isnan(self.recent) else 0.95 * self.recent + 0.05 * divergence

    def _batch(self) -> tuple[Tensor, Tensor]:
        """Token ids and weights [B, T], text by text in proportion to the shares, none twice before all were taken."""
        tokens, weights = [], []
        for i in torch.multinomial(self._shares, self._settings.batch_size, True, generator=self._generator).tolist():
            passages, order = self._texts[i].passages, self._orders[i]
            row = int(order[self._taken[i] % len(order)])
            self._taken[i] += 1
            tokens.append(passages.tokens[row].long())
            # row t of the states foretells token t + 1; the last one is taught by the dense model alone
            scored = torch.cat((passages.scored[row], torch.ones(1, dtype=torch.bool)))
            weights.append(torch.where(scored, 1.0, _UNSCORED_WEIGHT))
        return torch.stack(tokens), torch.stack(weights)

    def save(self, path: Path) -> None:
        """Whole or not at all."""
        state = {
            "task": self._task,
            "step": self.step,
            "recent": self.recent,
            "taken": self._taken,
            "generator": self._generator.get_state(),
            "optimizer": self._optimizer.state_dict(),
            "tensors": {name: [t.detach() for t in tensors] for name, tensors in self._groups.items()},
        }
        partial = path.with_name(f".{path.name}.partial")
        torch.save(state, partial)
        partial.replace(path)

    def resume(self, path: Path) -> None:
        """Raises `CheckpointError` for a file that is damaged or of another task."""
        if not path.exists():
            return
        try:
            state = torch.load(path, weights_only=True)
        except Exception as error:
            raise CheckpointError(f"cannot read {path} ({error}); remove it to begin anew") from error
        if state.get("task") != self._task:
            raise CheckpointError(f"{path} is of another distillation; remove it to begin anew")
        self.step, self.recent, self._taken = state["step"], state["recent"], state["taken"]
        self._generator.set_state(state["generator"])
        self._optimizer.load_state_dict(state["optimizer"])
        with torch.no_grad():
            for name, tensors in self._groups.items():
                for tensor, saved in zip(tensors, state["tensors"][name], strict=True):
                    tensor.copy_(saved)


def _task_of(plan: RefactorPlan, texts: Sequence[Text], settings: DistilSettings) -> str:
    """What a state must be of to go on from."""
    digest = hashlib.sha256(plan.to_bytes())
    digest.update(json.dumps(asdict(settings), sort_keys=True).encode())
    for text in texts:
        digest.update(f"{text.share}".encode())
        digest.update(text.passages.tokens.numpy().tobytes())
        digest.update(text.passages.scored.numpy().tobytes())
    return digest.hexdigest()
