"""How much of a model's routing each predictor foretells, at equal bytes: `foregate bench predict`."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import msgspec
import numpy as np
from torch import Tensor

from cache.predictors import LEARNED, PREDICTORS
from cache.predictors.fusion import Fusion
from cache.predictors.path import PATH
from cache.predictors.predictor import View
from engine.batch import Batch
from engine.checkpoint import Checkpoint
from engine.config import EngineConfig
from engine.convert import Progress
from engine.engine import Engine
from engine.errors import ConfigError
from engine.foresight import make_gates
from engine.layers.foresight import MAX_DISTANCE, Gate, TokenRouter
from engine.path_router import load_path_router, path_router_path
from engine.sampling_params import SamplingParams
from engine.tokenizer import Tokenizer
from kernels.backend import Routing, choose_backend

QUESTIONS_PATH = Path(__file__).parent / "refactor" / "data" / "questions.txt"
FUSED = "all, fused"


class PredictionResult(msgspec.Struct, frozen=True, kw_only=True):
    """Recall: share of a decode token's routed experts among the k likeliest, so each reads as many bytes."""

    predictor: str
    ahead: dict[int, float]  # by layers ahead
    from_tokens: float | None  # of all layers, before the first one; None if it says nothing then


class _Contest:
    """Every predictor alone and all of them fused, on the same steps. Only decode steps count."""

    def __init__(self, shape: tuple[int, int, int], gates: dict[str, Gate], path: TokenRouter | None) -> None:
        self._gates = gates
        self._path = path
        self._shape = shape
        unknown = {*LEARNED} - gates.keys() - ({PATH} if path is not None else set())
        names = [name for name in PREDICTORS if name not in unknown]
        teams = {name: [name] for name in names} | ({FUSED: list(names)} if len(names) > 1 else {})
        self._ahead = {team: self._fusion(members, MAX_DISTANCE) for team, members in teams.items()}
        paths = {team: [m for m in members if m not in self._gates] for team, members in teams.items()}
        self._paths = {team: self._fusion(members, shape[0]) for team, members in paths.items() if members}
        self._counts: dict[tuple[str, int], list[int]] = defaultdict(lambda: [0, 0])  # distance 0: from tokens
        self._view: View | None = None
        self._is_decode = False

    def _fusion(self, names: Sequence[str], max_distance: int) -> Fusion:
        return Fusion([PREDICTORS[name](*self._shape) for name in names], self._shape, max_distance)

    def step_begins(self, batch: Batch) -> None:
        self._is_decode = batch.phase == "decode"
        tokens = batch.token_ids.tolist()
        known = {} if self._path is None else {PATH: self._path(batch.requests, tokens)}
        self._view = View(-1, batch.requests, tokens, known)
        for fusion in (*self._ahead.values(), *self._paths.values()):
            fusion.step_begins()
        for fusion in self._paths.values():
            fusion.predict(self._view)

    def layer_begins(self, index: int, x: Tensor, routing: Routing, batch: Batch) -> None:
        num_layers, num_experts, _ = self._shape
        assert self._view is not None
        chosen = np.zeros((len(batch.requests), num_experts), dtype=np.bool_)
        np.put_along_axis(chosen, routing.ids.numpy().astype(np.int64), True, axis=1)
        for team, fusion in self._ahead.items():
            for distance, counts in fusion.observe(index, self._view, chosen).items():
                self._count(team, distance, counts)
        for team, fusion in self._paths.items():
            for counts in fusion.observe(index, self._view, chosen).values():
                self._count(team, 0, counts)
        if index + 1 == num_layers:
            return
        known = {name: gate(index, x) for name, gate in self._gates.items()}
        outputs = {name: output for name, output in known.items() if output is not None}
        view = View(index, self._view.requests, self._view.token_ids, self._view.gates | outputs)
        for fusion in self._ahead.values():
            fusion.predict(view)

    def step_ends(self) -> None:
        """Nothing."""

    def request_ends(self, number: int) -> None:
        for fusion in (*self._ahead.values(), *self._paths.values()):
            fusion.ended(number)
        if self._path is not None:
            self._path.ended(number)

    def _count(self, team: str, distance: int, counts: tuple[int, int]) -> None:
        if self._is_decode:
            total = self._counts[team, distance]
            total[0] += counts[0]
            total[1] += counts[1]

    def results(self) -> list[PredictionResult]:
        def recall(team: str, distance: int) -> float | None:
            hits, uses = self._counts[team, distance]
            return hits / uses if uses else None

        results = []
        for team in self._ahead:
            ahead = {d: recall(team, d) for d in range(1, MAX_DISTANCE + 1)}
            found = {distance: value for distance, value in ahead.items() if value is not None}
            results.append(PredictionResult(predictor=team, ahead=found, from_tokens=recall(team, 0)))
        return results


def bench_prediction(
    config: EngineConfig, *, prompts: Sequence[str] = (), output_tokens: int = 64, progress: Progress | None = None
) -> list[PredictionResult]:
    """Let the model answer prompts that no predictor learned from, several at once; greedy.

    `prompts`: texts; if there are none, fifty that come with Foregate and that nothing is learned from. Raises
    `ConfigError` for a model that has no layers to foretell.
    """
    config = config.resolved(has_experts=True)
    checkpoint = Checkpoint(config.model)
    moe = checkpoint.spec.moe
    if moe is None or len(moe.layers) < 2:
        raise ConfigError("this model has no two layers with experts: there is nothing to foretell")
    tokenizer = Tokenizer(config.model)
    backend = choose_backend(config.kernels, config.num_threads or 1)
    shape = (len(moe.layers), moe.num_experts, moe.num_active)
    path = load_path_router(path_router_path(config.cache, checkpoint), checkpoint)
    contest = _Contest(shape, make_gates(list(PREDICTORS), checkpoint, backend, config.cache), path)
    config = replace(config, cache=replace(config.cache, predictor="off"))
    engine = Engine(config, progress, tokenizer=tokenizer, backend=backend, observer=contest)
    texts = list(prompts) or QUESTIONS_PATH.read_text(encoding="utf-8").splitlines()
    params = SamplingParams(temperature=0.0, max_tokens=output_tokens)
    try:
        for i, text in enumerate(texts):
            chat = [{"role": "user", "content": text}]
            prompt = tokenizer.render_chat(chat) if tokenizer.has_chat_template else tokenizer.encode(text)
            engine.add_request(str(i), prompt, params)
        while engine.has_work:
            engine.step()
            if progress is not None:
                progress("prompts answered", len(texts) - len(list(engine.scheduler.requests)), len(texts))
    finally:
        engine.close()
    return contest.results()
