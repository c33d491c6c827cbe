"""The engine: the only place that sees scheduler, runner and sampler. Synchronous; one thread calls it."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from torch import Tensor

from cache.device.device import Device, DeviceOutOfMemory
from cache.expert_cache import ExpertCache
from cache.expert_table import ExpertTable
from cache.stats import CacheStats
from engine.admission import check_request
from engine.answers import Answers
from engine.assembly import assemble
from engine.cache_control import control
from engine.checkpoint import Checkpoint
from engine.choosing import choose_tokens
from engine.config import EngineConfig
from engine.convert import Progress
from engine.detokenizer import Detokenizer
from engine.errors import InvalidRequest
from engine.layers.foresight import RoutingObserver
from engine.layers.moe import ExpertFailure
from engine.messages import CacheAction, EngineStats, RequestOutput
from engine.models.spec import MoeSpec
from engine.request import Request
from engine.sampler import Sampler
from engine.sampling_params import SamplingParams
from engine.scheduler import SchedulerOutput
from engine.step_parts import StepParts
from engine.tokenizer import TokenDecoder
from kernels.backend import Backend, Choose

_log = logging.getLogger(__name__)

_IDLE_WAIT_S = 0.01  # for a grammar, where there is nothing else to do
_MAX_FAILED_STEPS = 3  # one after the other: then it is not the requests


class Engine:
    """Loads a checkpoint on construction, then serves what `add_request` brings, a `step` at a time.

    Raises `ConfigError`, `CheckpointError` or `cache.packed_file.PackedFileError`, each naming the cure.
    """

    def __init__(
        self,
        config: EngineConfig,
        progress: Progress | None = None,
        *,
        checkpoint: Checkpoint | None = None,
        tokenizer: TokenDecoder | None = None,
        backend: Backend | None = None,
        observer: RoutingObserver | None = None,
        device: Device | None = None,
        sampler: Callable[[Sequence[int], Choose], Sampler] = Sampler,
        rank: int = 0,
        meeting: Path | None = None,
    ) -> None:
        """`checkpoint`, `tokenizer`, `backend` and `device` stand in for what the configuration names, `sampler` for
        the usual one; `observer` sees every layer call.

        `rank` and `meeting`: of one that follows, see `engine.expert_group`."""
        parts = assemble(
            config,
            progress,
            checkpoint=checkpoint,
            tokenizer=tokenizer,
            backend=backend,
            observer=observer,
            device=device,
            rank=rank,
            meeting=meeting,
        )
        self.config = parts.config
        self.info = parts.info
        self.tokenizer = parts.tokenizer
        self.recordings = parts.recordings
        self.scheduler = parts.scheduler
        self._spec = parts.spec
        self._device = parts.device
        self._group = parts.group
        self._experts = parts.experts
        self._live = parts.live
        self._observers = parts.observers
        self._runner = parts.runner
        self._blocks = parts.blocks
        self._constraints = parts.constraints
        self._next_seed = parts.next_seed
        self._sampler = sampler(sorted(parts.eos_token_ids), parts.choose)
        self._answers = Answers(parts.tokenizer, parts.eos_token_ids)
        self._requests: dict[str, Request] = {}
        self._num_requests = 0
        self._num_failed_steps = 0  # since one that did not
        self._num_prompt_tokens = 0
        self._num_computed_prompt_tokens = 0
        self._num_steps = 0
        self._step_s = 0.0
        self._parts = StepParts()

    def observe(self, observer: RoutingObserver) -> None:
        """Tell one more observer of every layer call from the next step on."""
        self._observers.add(observer)

    @property
    def moe(self) -> MoeSpec:
        """Of a model with experts."""
        assert self._spec.moe is not None
        return self._spec.moe

    @property
    def expert_cache(self) -> ExpertCache:
        """Of a model with experts."""
        assert self._experts is not None
        return self._experts.cache

    @property
    def token_experts_nbytes(self) -> int:
        """Bytes of the experts' weights that one token needs."""
        if self._experts is None or (moe := self._spec.moe) is None:
            return 0
        layout = self._experts.records.layout
        return len(moe.layers) * moe.num_active * sum(section.nbytes for section in layout.sections)

    @property
    def _stall_s(self) -> float:
        return 0.0 if self._experts is None else self._experts.cache.stall_s

    @property
    def has_work(self) -> bool:
        return self.scheduler.has_work or bool(self._constraints.waiting)

    def check(self, prompt_token_ids: list[int], params: SamplingParams) -> None:
        """Raise `InvalidRequest` if this model cannot serve this request. Reads nothing that a step changes."""
        check_request(self.info, prompt_token_ids, params)

    def add_request(self, request_id: str, prompt_token_ids: list[int], params: SamplingParams) -> None:
        """Queue a request; raises `InvalidRequest` as `check`, and for an id that is in use."""
        self.check(prompt_token_ids, params)
        if request_id in self._requests:
            raise InvalidRequest(f"request id {request_id!r} is in use", param="request_id")
        limit = self.info.max_model_len
        if params.max_tokens is not None:
            limit = min(limit, len(prompt_token_ids) + params.max_tokens)
        request = Request(
            request_id=request_id,
            token_ids=list(prompt_token_ids),
            num_prompt_tokens=len(prompt_token_ids),
            params=params,
            max_num_tokens=limit,
            seed=params.seed if params.seed is not None else self._next_seed(),
            number=self._num_requests,
            detokenizer=Detokenizer(
                self.tokenizer, prompt_token_ids, stop=params.stop, skip_special_tokens=params.skip_special_tokens
            ),
        )
        if params.prompt_logprobs is not None:
            request.new_scores.append([(prompt_token_ids[0], math.nan)])
        self._num_requests += 1
        self.recordings.request_begins(request.number, request.num_prompt_tokens)
        if self._live is not None:
            self._live.request_begins(request.number, prompt_token_ids)
        self._requests[request_id] = request
        self._num_prompt_tokens += request.num_prompt_tokens
        if self._constraints.admit(request):
            self.scheduler.add(request)

    def abort_request(self, request_id: str) -> None:
        """Forget a request wherever it is; one that is unknown or done is not an error."""
        request = self._requests.pop(request_id, None)
        if request is not None:
            if not self._constraints.drop(request):
                self.scheduler.remove(request)
            if self._experts is not None:
                self._experts.cache.ended(request.number)
            if self._group is not None:
                self._group.request_ends(request.number)
            self._observers.request_ends(request.number)

    def step(self) -> list[RequestOutput]:
        """Compute one step and return what is new of each request that got a token or ended.

        What goes wrong ends the requests whose doing it is; if that cannot be told, those of the step. Raises only
        if the books do not add up afterwards, or one step after the other fails.
        """
        scheduled_from = time.perf_counter()
        compiled, refused = self._constraints.compiled(0.0 if self.scheduler.has_work else _IDLE_WAIT_S)
        for request in (*compiled, *(request for request, _ in refused)):
            self.scheduler.add(request)
        if refused:
            return [self._fail(request, why) for request, why in refused]
        output = self.scheduler.schedule()
        if not output.num_tokens:
            return []
        try:
            results = self._step(output, scheduled_from)
        except Exception as error:
            if self._group is not None:  # the other processes may be anywhere in the step
                raise
            return self._fail_step(output, error)
        self._num_failed_steps = 0
        return results

    def _step(self, output: SchedulerOutput, scheduled_from: float) -> list[RequestOutput]:
        clock = time.perf_counter
        started = clock()
        stalled_before = self._stall_s
        try:
            output, logits = self._runner.run_what_fits(output)
        except ExpertFailure as failure:
            return self._fail_rows(output, failure)
        except DeviceOutOfMemory as error:
            _log.error("%s", error)
            return [self._fail(request, str(error)) for request in list(output.num_tokens)[:1]]
        sampled_requests = [
            request
            for request, num_tokens in output.num_tokens.items()
            if request.num_computed_tokens + num_tokens == request.num_tokens
        ]
        computed = clock()
        self._num_computed_prompt_tokens += sum(
            max(0, min(num_tokens, request.num_prompt_tokens - request.num_computed_tokens))
            for request, num_tokens in output.num_tokens.items()
        )
        self.scheduler.update(output)
        sampled_from = clock()
        results = self._sample(logits, sampled_requests)
        results += [self._answers.scored(request) for request in output.num_tokens if request.new_scores]
        self._num_steps += 1
        ended = clock()
        self._step_s += ended - started
        self.scheduler.took(output, ended - started)
        self._parts.add(
            output.total_num_tokens,
            self._runner.model.times,
            model_s=computed - started,
            stall_s=self._stall_s - stalled_before,
            sample_s=ended - sampled_from,
            schedule_s=started - scheduled_from + sampled_from - computed + clock() - ended,
        )
        if self._experts is not None:
            self._experts.cache.step_ended(ended - started)
        return results

    def _sample(self, logits: Tensor, requests: list[Request]) -> list[RequestOutput]:
        """A request whose own parameters or text raise fails alone."""
        results = []
        chosen = choose_tokens(logits, requests, self._sampler, self._constraints)
        for request, token in zip(requests, chosen, strict=True):
            if isinstance(token, InvalidRequest):
                results.append(self._fail(request, token))
                continue
            try:
                if isinstance(token, Exception):
                    raise token
                results.append(self._told(self._answers.append(request, token)))
            except Exception as error:
                _log.exception("request %s fails", request.request_id)
                results.append(self._fail(request, f"{type(error).__name__}: {error}"))
        return results

    def follow(self) -> None:
        """Of a rank that does not lead: compute its experts' share of each step, until there are no more.

        Raises `RuntimeError` when the leader is gone.
        """
        self._runner.follow(self.expert_cache.ended)

    def stats(self) -> EngineStats:
        """A snapshot; the state is the caller's to fill in."""
        return EngineStats(
            state="ready",
            num_running=len(self.scheduler.running),
            num_waiting=len(self.scheduler.waiting) + len(self._constraints.waiting),
            kv_blocks=self._blocks.num_blocks,
            kv_blocks_used=self._blocks.num_used,
            prompt_tokens_total=self._num_prompt_tokens,
            computed_prompt_tokens_total=self._num_computed_prompt_tokens,
            output_tokens_total=self._answers.num_tokens,
            prefix_queries_total=self.scheduler.num_prefix_queries,
            prefix_hits_total=self.scheduler.num_prefix_hits,
            preemptions_total=self.scheduler.num_preemptions,
            passes_over_total=self.scheduler.num_passed_over,
            steps_total=self._num_steps,
            step_seconds_total=self._step_s,
            step_s=self._parts.step_s,
            batch_tokens=self._parts.batch_tokens,
            expert_cache=self._experts.cache.stats() if self._experts is not None else CacheStats(),
        )

    def control_cache(self, action: CacheAction, experts: list[tuple[int, int]] | None) -> int:
        """See `AsyncEngine.control_cache`; raises `ValueError`."""
        return control(action, experts, self._blocks, None if self._experts is None else self._experts.cache)

    def expert_table(self) -> ExpertTable | None:
        """Of each expert how often it was asked for, and where it is; None for a model without."""
        return None if self._experts is None else self._experts.cache.table()

    def check_integrity(self, *, idle: bool = True) -> None:
        """Raise `AssertionError` if requests, blocks or expert slots do not add up. Between steps only.

        `idle`: no expert is on its way either.
        """
        self.scheduler.check_integrity()
        if set(self._requests.values()) != {*self.scheduler.requests, *self._constraints.waiting}:
            raise AssertionError("the engine and the scheduler know different requests")
        if self._experts is not None:
            self._experts.cache.check_integrity(idle=idle)

    def close(self) -> None:
        """Write the recorded trace, if any, and end the I/O threads and what other processes there are."""
        self.recordings.close()
        if self._group is not None:
            self._group.close()
        self._constraints.close()
        if self._experts is not None:
            self._experts.close()
        if self._device is not None:
            self._device.close()

    def _told(self, output: RequestOutput) -> RequestOutput:
        """What an ended request held is free before anybody hears of its end."""
        if output.finish_reason is not None:
            self.abort_request(output.request_id)
        return output

    def _fail_rows(self, output: SchedulerOutput, failure: ExpertFailure) -> list[RequestOutput]:
        """The requests whose tokens need the unreadable expert fail; the step is run again for the others."""
        _log.error("%s", failure)
        return [self._fail(request, str(failure)) for request in output.requests_of(failure.rows)]

    def _fail_step(self, output: SchedulerOutput, error: Exception) -> list[RequestOutput]:
        _log.error("a step of %d requests failed", len(output.num_tokens), exc_info=error)
        self._num_failed_steps += 1
        failed = [request for request in output.num_tokens if request.request_id in self._requests]
        outputs = [self._fail(request, f"{type(error).__name__}: {error}") for request in failed]
        self.check_integrity(idle=False)
        if self._num_failed_steps >= _MAX_FAILED_STEPS:
            raise error
        return outputs

    def _fail(self, request: Request, error: str | InvalidRequest) -> RequestOutput:
        return self._told(self._answers.failed(request, error))
