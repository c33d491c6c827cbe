"""Learn a pre-gate: first to choose what the routers choose, then to make the model say what the dense one says."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

from engine.models.spec import PregateSpec
from engine.refactor.dense import Rotary
from engine.refactor.distil import Text
from engine.refactor.healing import healed, rounded
from engine.refactor.plan import PregatePlan, RefactorPlan
from engine.refactor.pregate import PregateModel
from engine.refactor.source import DenseSource
from engine.refactor.student import Routes, Student
from engine.refactor.student_math import choose

_NUM_JUDGED = 8  # batches by which distillation is judged

Progress = Callable[[str, int, int, float], None]  # what is done, steps done, steps in all, the loss lately


@dataclass(frozen=True, slots=True, kw_only=True)
class PregateSettings:
    """The pre-gate's sizes, and how long and how fast it learns."""

    hidden_size: int = 192
    num_layers: int = 2
    intermediate_size: int = 512
    num_recorded_tokens: int = 400_000  # whose routing is learned from
    num_epochs: int = 8
    recorded_batch_size: int = 16  # sequences
    rate: float = 2e-3
    num_distil_tokens: int = 200_000
    batch_size: int = 8
    distil_rate: float = 3e-4
    temperature: float = 0.5  # of the slope by which it is distilled, in units of its logits
    seed: int = 0

    @property
    def spec(self) -> PregateSpec:
        return PregateSpec(
            hidden_size=self.hidden_size, num_layers=self.num_layers, intermediate_size=self.intermediate_size
        )


def learn_pregate(
    source: DenseSource,
    plan: RefactorPlan,
    texts: Sequence[Text],
    settings: PregateSettings,
    *,
    state: Path | None = None,
    compiled: bool = True,
    progress: Progress = lambda what, done, total, loss: None,
) -> PregatePlan:
    """A pre-gate for the experts of `plan`, whose own routers and healing stay as they are.

    `state`: a file that keeps what was learned by imitation, and is gone on from if it is there.

    Texts as in `engine.refactor.distil`. Memory: the model twice, one batch's activations, and of every recorded token
    a byte for each expert of each layer.
    """
    student = Student(
        healed(source, plan.healing), plan, rank=1, temperature=settings.temperature, seed=0, compiled=compiled
    )
    teacher = Student(source, plan, rank=1, temperature=1.0, seed=0, compiled=compiled)
    for tensors in (*student.learning().values(), *teacher.learning().values()):
        for tensor in tensors:
            tensor.requires_grad_(False)
    split_layers = plan.settings.split_layers(source.config.num_hidden_layers)
    torch.manual_seed(settings.seed)
    model = PregateModel(source.config, settings.spec, plan.settings.num_experts, split_layers)
    learning = _Learning(model, student, teacher, texts, settings, progress)
    if state is not None and state.exists():
        model.load_state_dict(torch.load(state, weights_only=True))
    else:
        learning.imitate()
        if state is not None:
            torch.save(model.state_dict(), state)
    learning.distil()
    return PregatePlan(settings.spec, {name: rounded(p) for name, p in model.named_parameters()})


class _Learning:
    def __init__(
        self,
        model: PregateModel,
        student: Student,
        teacher: Student,
        texts: Sequence[Text],
        settings: PregateSettings,
        progress: Progress,
    ) -> None:
        self._model, self._student, self._teacher = model, student, teacher
        self._texts, self._settings, self._progress = texts, settings, progress
        self._length = texts[0].passages.tokens.shape[1]
        self._rotary = Rotary.build(student.config, self._length)
        self._generator = torch.Generator().manual_seed(settings.seed)
        self._shares = torch.tensor([text.share for text in texts])

    def _draw(self, num_seqs: int) -> Tensor:
        """Token ids [num_seqs, T]."""
        rows = []
        for i in torch.multinomial(self._shares, num_seqs, True, generator=self._generator).tolist():
            tokens = self._texts[i].passages.tokens
            rows.append(tokens[int(torch.randint(len(tokens), (), generator=self._generator))].long())
        return torch.stack(rows)

    def _logits(self, tokens: Tensor) -> Tensor:
        logits: Tensor = self._model(self._student.embed(tokens), self._rotary)
        return logits

    def imitate(self) -> None:
        """Binary cross-entropy against what the layers' routers choose."""
        settings = self._settings
        batch, num = settings.batch_size, max(1, settings.num_recorded_tokens // (self._length * settings.batch_size))
        tokens, chosen = [], []
        for i in range(num):
            tokens.append(self._draw(batch))
            routes = Routes([], [])
            with torch.no_grad():
                self._student.run(self._student.prefix(tokens[-1]), routes=routes)
            chosen.append(torch.stack(routes.chosen, 2))  # [B, T, L, E]
            self._progress("record routing", i + 1, num, math.nan)
        all_tokens, all_chosen = torch.cat(tokens), torch.cat(chosen)
        with torch.no_grad():  # begin at how often each expert is chosen
            for router, often in zip(self._model.routers.values(), all_chosen.float().mean((0, 1)), strict=True):
                assert isinstance(router, nn.Linear)
                router.weight.mul_(0.3)
                router.bias.copy_(torch.logit(often.clamp(0.02, 0.98)))
        size = min(settings.recorded_batch_size, len(all_tokens))
        orders = [torch.randperm(len(all_tokens), generator=self._generator) for _ in range(settings.num_epochs)]
        batches = [part for order in orders for part in order.split(size)]

        def loss(step: int) -> tuple[Tensor, float]:
            rows = batches[step]
            value = F.binary_cross_entropy_with_logits(self._logits(all_tokens[rows]), all_chosen[rows].float())
            return value, float(value.detach())

        self._train("imitate routers", len(batches), settings.rate, loss)

    def distil(self) -> None:
        """KL divergence from the dense model when the pre-gate routes; what makes it worse is undone."""
        settings = self._settings
        num_steps = settings.num_distil_tokens // (settings.batch_size * self._length)
        if num_steps == 0:
            return
        judged = [self._draw(settings.batch_size) for _ in range(_NUM_JUDGED)]
        before = self._divergence(judged)
        imitated = {name: tensor.clone() for name, tensor in self._model.state_dict().items()}

        def loss(step: int) -> tuple[Tensor, float]:
            tokens = self._draw(settings.batch_size)
            with torch.no_grad():
                wanted = self._teacher.teach(self._teacher.prefix(tokens))
            states = self._routed(tokens, self._logits(tokens))
            divergence, value = self._student.divergence(
                states.flatten(0, 1), wanted.flatten(0, 1), torch.ones(tokens.numel())
            )
            return value, divergence

        self._train("distil pre-gate", num_steps, settings.distil_rate, loss)
        after = self._divergence(judged)
        if after >= before:
            self._model.load_state_dict(imitated)
        self._progress("judge imitation", 1, 2, before)
        self._progress("judge distillation", 2, 2, after)

    @torch.no_grad()
    def _divergence(self, batches: Sequence[Tensor]) -> float:
        """Mean KL divergence from the dense model, in nats."""
        total = 0.0
        for tokens in batches:
            wanted = self._teacher.teach(self._teacher.prefix(tokens))
            states = self._routed(tokens, self._logits(tokens))
            total += self._student.divergence(states.flatten(0, 1), wanted.flatten(0, 1), torch.ones(tokens.numel()))[0]
        return total / len(batches)

    def _routed(self, tokens: Tensor, logits: Tensor) -> Tensor:
        """Final normed states when these logits of the split layers route."""
        with torch.no_grad():
            hidden = self._student.prefix(tokens)
        active = torch.tensor(self._student.settings.num_active)
        masks = [choose(layer, active, self._settings.temperature)[0] for layer in logits.unbind(2)]
        return self._student.run(hidden, masks=masks)[0]

    def _train(self, what: str, num_steps: int, rate: float, loss: Callable[[int], tuple[Tensor, float]]) -> None:
        """`loss` gives a step's loss and what to tell of it. Cosine, after a warm-up of a twentieth."""
        optimizer = torch.optim.AdamW(self._model.parameters(), lr=rate, betas=(0.9, 0.98), weight_decay=0.05)
        recent = math.nan
        for step in range(num_steps):
            warm = min(1.0, (step + 1) / max(1.0, num_steps / 20))
            for group in optimizer.param_groups:
                group["lr"] = rate * warm * (0.5 * (1 + math.cos(math.pi * step / num_steps)) + 1e-3)
            value, told = loss(step)
            optimizer.zero_grad()
            value.backward()
            torch.nn.utils.clip_grad_norm_(self._model.parameters(), 1.0)
            optimizer.step()
            recent = told if math.isnan(recent) else 0.95 * recent + 0.05 * told
            self._progress(what, step + 1, num_steps, recent)
