"""What expert-aware batching is worth on a running engine: `foregate bench schedule`."""

from __future__ import annotations

import random
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import msgspec
import numpy as np

from engine.bench import Workload, bench_prompts
from engine.bench_offload import open_engine
from engine.bench_prediction import QUESTIONS_PATH
from engine.checkpoint import Checkpoint
from engine.config import EngineConfig, SchedulerConfig
from engine.engine import Engine
from engine.errors import ConfigError
from engine.sampling_params import SamplingParams
from engine.synthetic import SyntheticCheckpoint
from engine.tokenizer import Tokenizer

Answers = dict[str, list[int]]


class ScheduleResult(msgspec.Struct, frozen=True, kw_only=True):
    """One scheduler at one size of the cache. All requests are there from the start; times from then on."""

    memory_share: float  # of the experts that have a slot
    scheduler: str
    max_num_seqs: int
    max_step_seqs: int
    tokens_per_s: float  # of answers, over the whole run
    read_mb_per_token: float
    itl_ms_mean: float  # between two tokens of one answer
    itl_ms_p99: float
    ttft_s_mean: float
    latency_s_mean: float  # of a whole answer
    latency_s_p99: float
    same_tokens: bool  # as the run with all experts in memory


@dataclass(frozen=True, slots=True)
class Contender:
    """'fcfs:16', 'expert-aware:64' (64 run) or 'expert-aware:64/16' (16 of them in a step)."""

    policy: str
    max_num_seqs: int
    max_step_seqs: int | None

    @classmethod
    def parse(cls, text: str) -> Contender:
        """Raises `ConfigError`."""
        policy, _, sizes = text.strip().partition(":")
        runs, _, steps = sizes.partition("/")
        try:
            return cls(policy, int(runs), int(steps) if steps else None)
        except ValueError:
            raise ConfigError(f"cannot read scheduler {text!r}; write it like fcfs:16 or expert-aware:64/16") from None

    def applied(self, config: SchedulerConfig) -> SchedulerConfig:
        """The configuration that stands for it."""
        budget = max(config.max_num_batched_tokens, self.max_num_seqs)
        return replace(
            config,
            policy=self.policy,
            max_num_seqs=self.max_num_seqs,
            max_step_seqs=self.max_step_seqs,
            max_num_batched_tokens=budget,
        )


@dataclass(frozen=True, slots=True)
class _Run:
    answers: Answers
    seconds: float
    times: dict[str, list[float]]  # of each token of each answer
    read_nbytes: int


def bench_schedule(
    config: EngineConfig,
    workload: Workload,
    contenders: Sequence[Contender],
    *,
    num_requests: int = 64,
    memory_shares: Sequence[float] = (0.5, 0.25, 0.125),
    random_shape: str | None = None,
    num_layers: int | None = None,
    routing_skew: float = 0.0,
    progress: Callable[[str, int, int], None] | None = None,
) -> Iterator[ScheduleResult]:
    """The same requests with all experts in memory, then with each share by each scheduler.

    A checkpoint answers everyday questions of five domains, random weights random prompts; answers have half to one
    and a half times the workload's tokens.
    """
    with tempfile.TemporaryDirectory(prefix="foregate-bench-") as scratch:
        directory = Path(scratch) if random_shape is not None else config.model
        config = replace(config, model=directory, cache=replace(config.cache, packed_dir=Path(scratch)))

        def run(config: EngineConfig) -> tuple[_Run, int, int]:
            checkpoint = (
                Checkpoint(directory)
                if random_shape is None
                else SyntheticCheckpoint(random_shape, num_layers, directory, routing_skew)
            )
            with open_engine(config.resolved(has_experts=True), checkpoint, progress) as engine:
                prompts = (
                    _questions(engine, num_requests)
                    if random_shape is None
                    else bench_prompts(engine, workload, num_requests, seed=0)
                )
                stats = engine.stats().expert_cache
                return _serve(engine, workload, prompts), stats.num_slots, stats.slot_nbytes

        first = contenders[0].applied(config.scheduler)
        resident, num_experts, record_nbytes = run(replace(config, scheduler=first))
        for share in memory_shares:
            cache = replace(config.cache, memory_nbytes=max(1, round(share * num_experts)) * record_nbytes)
            for contender in contenders:
                scheduler = contender.applied(config.scheduler)
                measured, _, _ = run(replace(config, cache=cache, scheduler=scheduler))
                yield _result(measured, resident.answers, share, scheduler)


def _questions(engine: Engine, num: int) -> list[list[int]]:
    """Prompts of five domains in turn, as the file has them one domain after the other."""
    lines = QUESTIONS_PATH.read_text(encoding="utf-8").splitlines()
    per_domain = len(lines) // 5
    mixed = [lines[i % 5 * per_domain + i // 5 % per_domain] for i in range(num)]
    assert isinstance(engine.tokenizer, Tokenizer)
    return [engine.tokenizer.render_chat([{"role": "user", "content": text}]) for text in mixed]


def _serve(engine: Engine, workload: Workload, prompts: Sequence[Sequence[int]]) -> _Run:
    rng = random.Random(0)
    for i, prompt in enumerate(prompts):
        params = SamplingParams(
            temperature=workload.temperature,
            max_tokens=max(2, round(workload.output_tokens * rng.uniform(0.5, 1.5))),
            ignore_eos=True,
            seed=i,
        )
        engine.add_request(str(i), list(prompt), params)
    answers: Answers = {str(i): [] for i in range(len(prompts))}
    times: dict[str, list[float]] = {name: [] for name in answers}
    before = engine.stats().expert_cache.fetched_nbytes
    started = time.perf_counter()
    while engine.has_work:
        outputs = engine.step()
        now = time.perf_counter() - started
        for output in outputs:
            answers[output.request_id] += output.token_ids
            times[output.request_id] += [now] * len(output.token_ids)
    seconds = time.perf_counter() - started
    return _Run(answers, seconds, times, engine.stats().expert_cache.fetched_nbytes - before)


def _result(run: _Run, resident: Answers, share: float, scheduler: SchedulerConfig) -> ScheduleResult:
    num_tokens = sum(map(len, run.answers.values()))
    gaps = np.concatenate([np.diff(times) for times in run.times.values()])
    ends = [times[-1] for times in run.times.values()]
    return ScheduleResult(
        memory_share=share,
        scheduler=scheduler.policy,
        max_num_seqs=scheduler.max_num_seqs,
        max_step_seqs=scheduler.step_seqs,
        tokens_per_s=num_tokens / run.seconds,
        read_mb_per_token=run.read_nbytes / 1e6 / num_tokens,
        itl_ms_mean=1e3 * float(gaps.mean()),
        itl_ms_p99=1e3 * float(np.percentile(gaps, 99)),
        ttft_s_mean=statistics.mean(times[0] for times in run.times.values()),
        latency_s_mean=statistics.mean(ends),
        latency_s_p99=float(np.percentile(ends, 99)),
        same_tokens=run.answers == resident,
    )
