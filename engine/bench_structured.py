"""What structured output costs in decode speed, the same tokens with and without: `foregate bench structured`."""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial
from typing import Literal

import msgspec
from torch import Tensor

from engine.bench import Workload, bench_prompts
from engine.config import EngineConfig
from engine.convert import Progress
from engine.engine import Engine
from engine.errors import ConfigError
from engine.request import Request
from engine.sampler import SampledToken, Sampler
from engine.sampling_params import SamplingParams, Structure
from kernels.backend import Choose

_RECORD = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 40},
        "age": {"type": "integer", "minimum": 0, "maximum": 150},
        "tags": {"type": "array", "items": {"enum": ["new", "open", "closed"]}, "maxItems": 3},
        "address": {
            "type": "object",
            "properties": {
                "city": {"type": "string", "maxLength": 30},
                "zip": {"type": "string", "pattern": "^[0-9]{5}$"},
            },
            "required": ["city", "zip"],
        },
        "active": {"type": "boolean"},
    },
    "required": ["name", "age", "tags", "address", "active"],
}
# none ends before the workload does
STRUCTURES: dict[str, tuple[Literal["json", "regex"], str]] = {
    "schema": ("json", json.dumps({"type": "array", "items": _RECORD, "minItems": 5000})),
    "any-json": ("json", json.dumps({"type": "array", "minItems": 5000})),
    "regex": ("regex", r"([A-Z][a-z]{1,14}(,? [a-z]{1,14}){3,20}[.?!] ){500}"),
}


class StructuredResult(msgspec.Struct, frozen=True, kw_only=True):
    """Of one structure. Milliseconds are medians over the decode steps of a turn, and then over turns."""

    structure: str
    num_seqs: int
    num_turns: int
    free_step_ms: float
    structured_step_ms: float
    cost: float  # share of decode speed that is lost: the median of the turns


class _Dictation(Sampler):
    """Samples as ever, and then takes the tokens it is told; structured answers come out the same by themselves."""

    def __init__(self, answers: dict[int, list[int]], eos_token_ids: Sequence[int], choose: Choose) -> None:
        """`answers` by the requests' seeds; may change."""
        super().__init__((), choose)
        self._answers = answers

    def sample(
        self, rows: Sequence[Tensor], requests: Sequence[Request], masks: Sequence[Tensor] | None = None
    ) -> list[SampledToken]:
        chosen = super().sample(rows, requests, masks)
        return [
            replace(token, token_id=self._answers[request.seed][request.num_output_tokens])
            if request.matcher is None and request.seed in self._answers
            else token
            for token, request in zip(chosen, requests, strict=True)
        ]


def bench_structured(
    config: EngineConfig,
    workload: Workload,
    *,
    num_seqs: int = 16,
    num_turns: int = 6,
    structures: Sequence[str] = tuple(STRUCTURES),
    progress: Progress | None = None,
) -> Iterator[StructuredResult]:
    """Each structure and no structure take turns; both make the tokens that the structure allowed in a run before."""
    for name in structures:
        if name not in STRUCTURES:
            raise ConfigError(f"unknown structure {name!r}; known: {', '.join(STRUCTURES)}")
    dictated: dict[int, list[int]] = {}
    scheduler = replace(config.scheduler, max_num_seqs=num_seqs)
    engine = Engine(replace(config, scheduler=scheduler), progress, sampler=partial(_Dictation, dictated))
    try:
        for name in structures:
            kind, source = STRUCTURES[name]
            structure = Structure(kind=kind, source=source, param=name)
            bench = _Bench(engine, dictated, workload, num_seqs, structure)
            bench.run(structured=True)
            bench.dictate()
            bench.run(structured=False)
            pairs: list[tuple[float, float]] = []
            for turn in range(num_turns):
                first = turn % 2 == 0  # whatever comes second gains or loses nothing by it
                one, other = bench.run(structured=first), bench.run(structured=not first)
                pairs.append((other, one) if first else (one, other))
            free, structured = zip(*pairs, strict=True)
            yield StructuredResult(
                structure=name,
                num_seqs=num_seqs,
                num_turns=num_turns,
                free_step_ms=statistics.median(free) * 1e3,
                structured_step_ms=statistics.median(structured) * 1e3,
                cost=statistics.median(1.0 - free_s / structured_s for free_s, structured_s in pairs),
            )
    finally:
        engine.close()


class _Bench:
    """Runs of one structure on one engine."""

    def __init__(
        self, engine: Engine, dictated: dict[int, list[int]], workload: Workload, num_seqs: int, structure: Structure
    ) -> None:
        self._engine = engine
        self._dictated = dictated
        self._workload = workload
        self._structure = structure
        self._prompts = bench_prompts(engine, workload, num_seqs, seed=num_seqs)
        self._answers: dict[int, list[int]] = {}
        self._dictated.clear()

    def run(self, *, structured: bool) -> float:
        """Median seconds of a step in which every sequence gets a token but its first."""
        engine = self._engine
        for i, prompt in enumerate(self._prompts):
            params = SamplingParams(
                temperature=self._workload.temperature,
                top_p=self._workload.top_p,
                max_tokens=self._workload.output_tokens,
                seed=i,
                structure=self._structure if structured else None,
            )
            engine.add_request(f"bench-{i}", prompt, params)
        answers: dict[int, list[int]] = {i: [] for i in range(len(self._prompts))}
        steps = []
        while engine.has_work:
            is_decode = all(answers.values())
            started = time.perf_counter()
            outputs = engine.step()
            if is_decode:
                steps.append(time.perf_counter() - started)
            for output in outputs:
                if output.error is not None:
                    raise RuntimeError(output.error)
                answers[int(output.request_id.partition("-")[2])] += output.token_ids
        if {len(answer) for answer in answers.values()} != {self._workload.output_tokens}:
            raise RuntimeError("an answer ended before the others")
        self._answers = answers
        return statistics.median(steps)

    def dictate(self) -> None:
        """From now on every run makes the last one's tokens."""
        self._dictated.update(self._answers)
