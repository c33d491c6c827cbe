"""What serving from a slower tier costs, by predictor, beside an oracle: `foregate bench offload`."""

from __future__ import annotations

import resource
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path

import msgspec
from torch import Tensor

from cache.prefetcher import Prefetcher
from cache.stats import CacheStats
from engine.batch import Batch
from engine.bench import Workload, bench_prompts
from engine.checkpoint import Checkpoint
from engine.config import EngineConfig
from engine.engine import Engine
from engine.layers.foresight import ExactForesight, OracleForesight
from engine.loader import expert_keys
from engine.number_tokenizer import NumberTokenizer
from engine.sampling_params import SamplingParams
from engine.synthetic import SyntheticCheckpoint
from engine.tokenizer import TokenDecoder
from kernels.backend import Routing

ORACLE = "oracle"
OFF = "off"
WARM_UP_TOKENS = 16  # of each sequence, before anything is counted


class OffloadResult(msgspec.Struct, frozen=True, kw_only=True):
    """One setting: medians over the turns of what each saw in its decode steps after the warm-up."""

    memory_share: float  # of the experts that have a slot
    link_gib_per_s: float | None  # None: the disk as it is
    predictor: str
    num_seqs: int
    tokens_per_s: float
    step_ms: float
    stall_ms_per_token: float
    hit_rate: float
    read_mb_per_token: float
    resident_step_ms: float  # of the run with all experts in memory
    link_step_ms: float  # bytes that were read in a step / the bandwidth that was measured
    of_bound: float  # step time / max(compute, bytes / bandwidth)
    num_turns: int
    same_bits: bool  # tokens and logprobs are always those of the resident run
    peak_rss_mib: float  # of the process so far
    recovered: float | None = None  # of what the oracle takes off the stall without prediction


class RoutingLog:
    """The experts that each layer of each step is asked for."""

    def __init__(self) -> None:
        self.steps: list[list[list[int]]] = []

    def step_begins(self, batch: Batch) -> None:
        self.steps.append([])

    def layer_begins(self, index: int, x: Tensor, routing: Routing, batch: Batch) -> None:
        self.steps[-1].append(list(routing.experts))

    def step_ends(self) -> None:
        """Nothing."""

    def request_ends(self, number: int) -> None:
        """Nothing."""


class OffloadRun(msgspec.Struct):
    """One pass over the workload."""

    answers: list[tuple[list[int], list[float]]]  # tokens and logprobs of each sequence
    step_s: list[float]  # of the counted steps
    before: CacheStats
    after: CacheStats


def bench_offload(
    config: EngineConfig,
    workload: Workload,
    *,
    num_seqs: int = 1,
    num_turns: int = 3,
    memory_shares: Sequence[float] = (0.5, 0.25),
    links: Sequence[float | None] = (None,),
    predictors: Sequence[str] = (OFF, "auto"),
    random_shape: str | None = None,
    num_layers: int | None = None,
    routing_skew: float = 0.0,
    progress: Callable[[str, int, int], None] | None = None,
) -> Iterator[OffloadResult]:
    """The same workload with all experts in memory, and with each share, link (bytes/s) and predictor.

    The engines of a share and a link take turns, with other prompts in each, so that all meet the machine as it is at
    the time; all of them are in memory at once. The packed file is read by O_DIRECT, so the page cache is always cold.
    Where the predictors hold `oracle` and `off`, what each recovers of the difference is told.
    """
    with tempfile.TemporaryDirectory(prefix="foregate-bench-") as scratch, ExitStack() as engines:
        directory = Path(scratch) if random_shape is not None else config.model
        config = replace(
            config,
            model=directory,
            scheduler=replace(config.scheduler, max_num_seqs=num_seqs),
            cache=replace(config.cache, packed_dir=Path(scratch)),
        ).resolved(has_experts=True)

        def checkpoint() -> Checkpoint:
            if random_shape is None:
                return Checkpoint(directory)
            return SyntheticCheckpoint(random_shape, num_layers, directory, routing_skew)

        whole = replace(config, cache=replace(config.cache, predictor=OFF))
        resident = engines.enter_context(open_engine(whole, checkpoint(), progress))
        num_experts, record_nbytes = resident.stats().expert_cache.num_slots, resident.stats().expert_cache.slot_nbytes
        log = RoutingLog()
        resident.observe(log)
        for share in memory_shares:
            for link in links:
                with ExitStack() as offloaded:
                    log.steps.clear()
                    of_each = {}
                    for predictor in predictors:
                        cache = replace(
                            config.cache,
                            memory_nbytes=max(1, round(share * num_experts)) * record_nbytes,
                            link_bandwidth=link,
                            predictor=OFF if predictor == ORACLE else predictor,
                        )
                        opened = open_engine(replace(config, cache=cache), checkpoint(), progress)
                        of_each[predictor] = offloaded.enter_context(opened)
                    if ORACLE in of_each:
                        of_each[ORACLE].observe(make_oracle(of_each[ORACLE], log))
                    turns: dict[str, list[OffloadResult]] = {predictor: [] for predictor in predictors}
                    for turn in range(num_turns):
                        expected = run_workload(resident, workload, num_seqs, seed=turn)
                        for predictor, engine in of_each.items():
                            run = run_workload(engine, workload, num_seqs, seed=turn)
                            turns[predictor].append(_result(run, expected, share, link, predictor, num_seqs))
                yield from _with_recovered([_medians(results) for results in turns.values()])


def make_oracle(engine: Engine, log: RoutingLog) -> ExactForesight:
    """An observer that reads ahead what the logged runs asked for; the log may grow from run to run."""
    moe, cache = engine.moe, engine.expert_cache
    keys = [expert_keys(moe, layer) for layer in moe.layers]
    return OracleForesight(Prefetcher(cache, len(keys)), keys, log.steps)


@contextmanager
def open_engine(
    config: EngineConfig, checkpoint: Checkpoint, progress: Callable[[str, int, int], None] | None
) -> Iterator[Engine]:
    """Closed at the end."""
    tokenizer: TokenDecoder | None = NumberTokenizer() if isinstance(checkpoint, SyntheticCheckpoint) else None
    engine = Engine(config, progress, checkpoint=checkpoint, tokenizer=tokenizer)
    try:
        yield engine
    finally:
        engine.close()


def run_workload(engine: Engine, workload: Workload, num_seqs: int, seed: int = 0) -> OffloadRun:
    """All sequences at once, each of `workload.output_tokens` beyond the warm-up; the seed gives the prompts."""
    prompts = bench_prompts(engine, workload, num_seqs, seed)
    for i, prompt in enumerate(prompts):
        params = SamplingParams(
            temperature=workload.temperature,
            max_tokens=workload.output_tokens + WARM_UP_TOKENS,
            ignore_eos=True,
            seed=i,
            logprobs=0,
        )
        engine.add_request(str(i), prompt, params)
    answers: dict[str, tuple[list[int], list[float]]] = {str(i): ([], []) for i in range(num_seqs)}
    step_s: list[float] = []
    before: CacheStats | None = None
    while engine.has_work:
        counts = all(len(tokens) >= WARM_UP_TOKENS for tokens, _ in answers.values())
        if counts and before is None:
            before = engine.stats().expert_cache
        started = time.perf_counter()
        outputs = engine.step()
        if counts:
            step_s.append(time.perf_counter() - started)
        for output in outputs:
            tokens, logprobs = answers[output.request_id]
            tokens += output.token_ids
            logprobs += [position.chosen.logprob for position in output.logprobs or []]
    after = engine.stats().expert_cache
    return OffloadRun(answers=list(answers.values()), step_s=step_s, before=before or after, after=after)


def _result(
    run: OffloadRun, resident: OffloadRun, share: float, link: float | None, predictor: str, num_seqs: int
) -> OffloadResult:
    num_steps = len(run.step_s)
    num_tokens = num_steps * num_seqs
    stall_s = run.after.decode.stall_s - run.before.decode.stall_s
    queries = run.after.decode.queries - run.before.decode.queries
    nbytes = run.after.fetched_nbytes - run.before.fetched_nbytes
    bandwidth = run.after.bandwidth
    step_ms = 1e3 * sum(run.step_s) / num_steps
    resident_step_ms = 1e3 * statistics.median(resident.step_s)
    link_step_ms = 1e3 * nbytes / num_steps / bandwidth if bandwidth else 0.0
    return OffloadResult(
        memory_share=share,
        link_gib_per_s=None if link is None else link / 1024**3,
        predictor=predictor,
        num_seqs=num_seqs,
        tokens_per_s=num_tokens / sum(run.step_s),
        step_ms=step_ms,
        stall_ms_per_token=1e3 * stall_s / num_tokens,
        hit_rate=(run.after.decode.hits - run.before.decode.hits) / max(1, queries),
        read_mb_per_token=nbytes / 1e6 / num_tokens,
        resident_step_ms=resident_step_ms,
        link_step_ms=link_step_ms,
        of_bound=step_ms / max(resident_step_ms, link_step_ms),
        num_turns=1,
        same_bits=run.answers == resident.answers,
        peak_rss_mib=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
    )


def _medians(turns: Sequence[OffloadResult]) -> OffloadResult:
    """Of one setting's turns."""
    measured = ("tokens_per_s", "step_ms", "stall_ms_per_token", "hit_rate", "read_mb_per_token")
    compared = ("resident_step_ms", "link_step_ms", "of_bound")
    return msgspec.structs.replace(
        turns[-1],
        num_turns=len(turns),
        same_bits=all(turn.same_bits for turn in turns),
        **{name: statistics.median(getattr(turn, name) for turn in turns) for name in (*measured, *compared)},
    )


def _with_recovered(results: list[OffloadResult]) -> Iterator[OffloadResult]:
    stalls = {r.predictor: r.stall_ms_per_token for r in results}
    for r in results:
        if {ORACLE, OFF} <= stalls.keys() and stalls[OFF] > stalls[ORACLE]:
            share = (stalls[OFF] - r.stall_ms_per_token) / (stalls[OFF] - stalls[ORACLE])
            yield msgspec.structs.replace(r, recovered=share)
        else:
            yield r
