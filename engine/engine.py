"""The engine: the only place that sees scheduler, runner and sampler. Synchronous; one thread calls it."""

from __future__ import annotations

import logging
import math
import os
import secrets
import time
from pathlib import Path

import torch
from torch import Tensor

from cache.device.device import Device, DeviceOutOfMemory
from cache.device.sim import SimDevice
from cache.expert_cache import ExpertCache
from cache.expert_table import ExpertTable
from cache.stats import CacheStats
from engine.admission import check_request
from engine.block_manager import BlockManager
from engine.cache_control import expert_keys_of
from engine.checkpoint import Checkpoint
from engine.config import EngineConfig
from engine.constraints import Constraints, spoiled_by
from engine.convert import Progress
from engine.detokenizer import Detokenizer
from engine.device_experts import DeviceExperts, device_room, open_named
from engine.errors import ConfigError, InvalidRequest
from engine.expert_group import ExpertGroup
from engine.footprint import dense_nbytes, room_for_experts
from engine.foresight import make_foresight
from engine.kv_cache import BLOCK_SIZE, KVCache
from engine.kv_plan import plan_kv
from engine.layers.foresight import Observers, RoutingObserver
from engine.layers.moe import ExpertArena, ExpertFailure
from engine.live_experts import LiveExperts
from engine.loader import expert_keys, free_memory_nbytes, kv_dtype, load_decoder, open_experts
from engine.messages import (
    CacheAction,
    EngineStats,
    FinishReason,
    ModelInfo,
    PositionLogprobs,
    RequestOutput,
    TokenLogprob,
)
from engine.model_runner import ModelRunner
from engine.models.spec import ModelSpec, MoeSpec
from engine.recordings import Recordings
from engine.request import Request
from engine.sampler import SampledToken, Sampler
from engine.sampling_params import SamplingParams
from engine.scheduler import SchedulerOutput
from engine.schedulers import SCHEDULERS
from engine.step_parts import StepParts
from engine.stream_backend import StepEnd, StreamBackend
from engine.tokenizer import TokenDecoder, Tokenizer
from kernels.backend import Backend, choose_backend

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
        rank: int = 0,
        meeting: Path | None = None,
    ) -> None:
        """`checkpoint`, `tokenizer`, `backend` and `device` stand in for what the configuration names; `observer` sees
        every layer call. `rank` and `meeting`: of one that follows, see `engine.expert_group`."""
        if config.expert_parallel > 1 and checkpoint is not None:
            raise ConfigError("the processes of --expert-parallel load a checkpoint from its directory")
        checkpoint = checkpoint or Checkpoint(config.model)
        spec = checkpoint.spec.with_router(config.router)
        config = config.resolved(spec.moe is not None)
        if config.scheduler.policy not in SCHEDULERS:
            raise ConfigError(f"unknown scheduler {config.scheduler.policy!r}; known: {', '.join(SCHEDULERS)}")
        num_threads = config.num_threads or len(os.sched_getaffinity(0))
        torch.set_num_threads(num_threads)
        try:
            backend = backend or choose_backend(config.kernels, num_threads)
        except (ValueError, RuntimeError) as error:
            raise ConfigError(str(error)) from error
        self.config = config
        self._spec = spec
        dtype = kv_dtype(config.dtype)
        num_blocks, max_model_len = plan_kv(config, spec, dtype)
        self.tokenizer = tokenizer or Tokenizer(config.model)
        dense = dense_nbytes(checkpoint, config.dtype)
        self._device = device or open_named(config.device)
        if self._device is not None and not isinstance(self._device, SimDevice):
            raise ConfigError("serving from a GPU is not put together yet (docs/gpu.md): leave out --device")
        if self._device is None:
            available = room_for_experts(free_memory_nbytes(), config.kv_memory_nbytes, dense)
        else:
            available = device_room(self._device, config.kv_memory_nbytes, dense)
        group = ExpertGroup(config, spec.moe, rank) if config.expert_parallel > 1 else None
        self._group = group
        if group is not None and meeting is not None:
            group.join(meeting)
        self._experts: ExpertArena | None = None
        if spec.moe is not None:
            self._experts = open_experts(
                checkpoint, config.cache, available, progress, device=self._device, group=group
            )
        if group is not None and meeting is None:
            group.lead()  # now that the packed experts are there
        waiter = None
        if isinstance(self._device, SimDevice) and isinstance(self._experts, DeviceExperts):
            on_stream = StreamBackend(backend, self._device, self._experts.pool.region)
            if config.cache.cpu_experts:
                self._experts.share_with_cpu(backend, on_stream.one_at_a_time)
            backend = on_stream
            waiter = StepEnd(self._device)
        elif config.cache.cpu_experts:
            raise ConfigError("experts are computed on the CPU anyway: leave out --cpu-experts, or name a device")
        foresight = None if group is not None else make_foresight(config, spec, self._experts, checkpoint, backend)
        self._live = None if config.scheduler.policy == "fcfs" else _live_experts(spec, self._experts)
        self._observers = Observers([one for one in (waiter, foresight, self._live, observer) if one is not None])
        self.recordings = Recordings(config.record_trace, spec.moe, self._observers)
        model = load_decoder(
            checkpoint,
            spec,
            config.dtype,
            max_model_len,
            backend,
            self._experts,
            progress,
            observer=self._observers,
        )
        self._runner = ModelRunner(model, KVCache(spec, num_blocks, dtype), group)
        self._blocks = BlockManager(num_blocks, BLOCK_SIZE)
        self.scheduler = SCHEDULERS[config.scheduler.policy](
            config.scheduler, self._blocks, self._live, time.perf_counter
        )
        self._eos_token_ids = frozenset(checkpoint.eos_token_ids() or _as_ids(self.tokenizer.eos_token_id))
        self._sampler = Sampler(sorted(self._eos_token_ids))
        self._constraints = Constraints(
            self.tokenizer.to_json, spec.vocab_size, sorted(self._eos_token_ids), num_threads
        )
        self._requests: dict[str, Request] = {}
        self._num_requests = 0
        self._seeds = secrets.SystemRandom() if config.seed is None else _SeedSequence(config.seed)
        self._counts = dict.fromkeys(
            ("prompt_tokens_total", "computed_prompt_tokens_total", "output_tokens_total", "steps_total"), 0
        )
        self._step_s = 0.0
        self._num_failed_steps = 0  # since one that did not
        self._parts = StepParts()
        self.info = ModelInfo(
            name=config.served_name or config.model.resolve().name,
            model_type=checkpoint.model_type,
            max_model_len=max_model_len,
            vocab_size=spec.vocab_size,
            has_chat_template=self.tokenizer.has_chat_template,
            chat_template=self.tokenizer.template_text,
            template_variables=self.tokenizer.template_variables,
            added_tokens=self.tokenizer.added_tokens,
            eos_token_ids=tuple(sorted(self._eos_token_ids)),
            dtype=config.dtype,
            expert_format=config.cache.format if self._experts is not None else None,
        )
        if group is not None:
            group.loaded()

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
            seed=params.seed if params.seed is not None else self._seeds.getrandbits(63),
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
        self._counts["prompt_tokens_total"] += request.num_prompt_tokens
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
            output, logits = self._compute(output)
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
        self._counts["computed_prompt_tokens_total"] += sum(
            max(0, min(num_tokens, request.num_prompt_tokens - request.num_computed_tokens))
            for request, num_tokens in output.num_tokens.items()
        )
        self.scheduler.update(output)
        sampled_from = clock()
        results = self._sample(logits, sampled_requests)
        results += [self._output(request, "", [], None) for request in output.num_tokens if request.new_scores]
        self._counts["steps_total"] += 1
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
        constrained, spoiled = self._constraints.constrain(logits, requests)
        try:
            tokens = self._sampler.sample(logits, requests, constrained)
        except Exception:
            tokens = []
        results = []
        for i, request in enumerate(requests):
            if request in spoiled:
                results.append(self._fail(request, spoiled[request]))
                continue
            try:
                row = slice(i, i + 1)
                token = tokens[i] if tokens else self._sampler.sample(logits[row], [request], constrained[row])[0]
                results.append(self._append(request, token))
            except Exception as error:
                _log.exception("request %s fails", request.request_id)
                results.append(self._fail(request, f"{type(error).__name__}: {error}"))
        return results

    def follow(self) -> None:
        """Of a rank that does not lead: compute its experts' share of each step, until there are no more.

        Raises `RuntimeError` when the leader is gone.
        """
        assert self._group is not None
        assert self._experts is not None
        while (step := self._group.receive()) is not None:
            for number in step.ended:
                self._experts.cache.ended(number)
            try:
                self._runner.follow(step.batch())
            except ExpertFailure as failure:
                _log.error("%s", failure)

    def _compute(self, output: SchedulerOutput) -> tuple[SchedulerOutput, Tensor]:
        """-> what was computed of it, and logits. What a device has no room for is tried again with half the tokens."""
        while True:
            try:
                return output, self._runner.run(output)
            except DeviceOutOfMemory as error:
                if output.total_num_tokens == 1:
                    raise
                _log.warning("a step of %d tokens is halved: %s", output.total_num_tokens, error)
                output = output.halved()

    def score(self, token_ids: list[int]) -> Tensor:
        """Natural-log likelihood of each token but the first, float32 [T - 1]; no prefix is taken from the cache.

        The engine must be idle. Raises `InvalidRequest` for token ids that cannot be a prompt.
        """
        if self.has_work:
            raise RuntimeError("only an idle engine can score")
        self.add_request("score", token_ids, SamplingParams(temperature=0.0, max_tokens=0, prompt_logprobs=0))
        logprobs: list[float] = []
        error: str | None = None
        while self.has_work:
            for output in self.step():
                logprobs += [position.chosen.logprob for position in output.prompt_logprobs or ()]
                error = error or output.error
        if error is not None:
            raise RuntimeError(error)
        return torch.tensor(logprobs[1:])

    def stats(self) -> EngineStats:
        """A snapshot; the state is the caller's to fill in."""
        return EngineStats(
            state="ready",
            num_running=len(self.scheduler.running),
            num_waiting=len(self.scheduler.waiting) + len(self._constraints.waiting),
            kv_blocks=self._blocks.num_blocks,
            kv_blocks_used=self._blocks.num_used,
            prompt_tokens_total=self._counts["prompt_tokens_total"],
            computed_prompt_tokens_total=self._counts["computed_prompt_tokens_total"],
            output_tokens_total=self._counts["output_tokens_total"],
            prefix_queries_total=self.scheduler.num_prefix_queries,
            prefix_hits_total=self.scheduler.num_prefix_hits,
            preemptions_total=self.scheduler.num_preemptions,
            passes_over_total=self.scheduler.num_passed_over,
            steps_total=self._counts["steps_total"],
            step_seconds_total=self._step_s,
            step_s=self._parts.step_s,
            batch_tokens=self._parts.batch_tokens,
            expert_cache=self._experts.cache.stats() if self._experts is not None else CacheStats(),
        )

    def control_cache(self, action: CacheAction, experts: list[tuple[int, int]] | None) -> int:
        """See `AsyncEngine.control_cache`; raises `ValueError`."""
        if action == "reset":
            self._blocks.reset_prefix_cache()
        if self._experts is None:
            if action != "reset":
                raise ValueError("this model has no experts")
            return 0
        cache = self._experts.cache
        if action == "reset":
            return cache.reset()
        keys = expert_keys_of(experts, cache.keys)
        if action == "pin":
            cache.keep(keys)
        return cache.warm(keys)

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

    def _append(self, request: Request, token: SampledToken) -> RequestOutput:
        if request.params.max_tokens == 0:
            return self._output(request, "", [], "length")
        request.token_ids.append(token.token_id)
        self._counts["output_tokens_total"] += 1
        params = request.params
        stop_reason: int | str | None = None
        finish: FinishReason | None = None
        text = ""
        matcher = request.matcher
        is_eos = token.token_id in self._eos_token_ids and (not params.ignore_eos or matcher is not None)
        if is_eos or token.token_id in params.stop_token_ids:
            finish = "stop"
            stop_reason = None if is_eos else token.token_id
        elif matcher is not None and not matcher.consume_token(token.token_id):
            return self._fail(request, spoiled_by(request))
        else:
            may_stop = request.num_output_tokens >= params.min_tokens
            text = request.detokenizer.push(token.token_id, may_stop=may_stop)
            if request.detokenizer.stop_string is not None or (matcher is not None and matcher.is_stopped()):
                finish = "stop"
            elif request.num_tokens >= request.max_num_tokens:
                finish = "length"
        if finish is not None:
            text += request.detokenizer.flush()
            if request.detokenizer.stop_string is not None:
                finish, stop_reason = "stop", request.detokenizer.stop_string
        return self._output(request, text, [token], finish, stop_reason)

    def _output(
        self,
        request: Request,
        text: str,
        tokens: list[SampledToken],
        finish: FinishReason | None,
        stop_reason: int | str | None = None,
        error: str | None = None,
    ) -> RequestOutput:
        if finish is not None:
            request.finish_reason = finish
            self.abort_request(request.request_id)
        wants_logprobs = request.params.logprobs is not None
        scores, request.new_scores = request.new_scores, []
        return RequestOutput(
            request_id=request.request_id,
            text=text,
            token_ids=[token.token_id for token in tokens],
            num_prompt_tokens=request.num_prompt_tokens,
            num_cached_tokens=min(request.num_cached_tokens, request.num_prompt_tokens),
            num_output_tokens=request.num_output_tokens,
            logprobs=[self._named(token.logprobs) for token in tokens] if wants_logprobs else None,
            prompt_logprobs=[self._named(score) for score in scores] or None,
            finish_reason=finish,
            stop_reason=stop_reason,
            error=error,
        )

    def _named(self, logprobs: list[tuple[int, float]] | None) -> PositionLogprobs:
        assert logprobs is not None
        named = [
            TokenLogprob(token_id, logprob, self.tokenizer.token_bytes(token_id)) for token_id, logprob in logprobs
        ]
        return PositionLogprobs(named[0], named[1:])

    def _fail_rows(self, output: SchedulerOutput, failure: ExpertFailure) -> list[RequestOutput]:
        """The requests whose tokens need the unreadable expert fail; the step is run again for the others."""
        _log.error("%s", failure)
        failed, first_row = [], 0
        for request, num_tokens in output.num_tokens.items():
            if any(first_row <= row < first_row + num_tokens for row in failure.rows):
                failed.append(request)
            first_row += num_tokens
        return [self._fail(request, str(failure)) for request in failed]

    def _fail_step(self, output: SchedulerOutput, error: Exception) -> list[RequestOutput]:
        _log.error("a step of %d requests failed", len(output.num_tokens), exc_info=error)
        self._num_failed_steps += 1
        failed = [request for request in output.num_tokens if request.request_id in self._requests]
        outputs = [self._fail(request, f"{type(error).__name__}: {error}") for request in failed]
        self.check_integrity(idle=False)
        if self._num_failed_steps >= _MAX_FAILED_STEPS:
            raise error
        return outputs

    def _fail(self, request: Request, error: str) -> RequestOutput:
        return self._output(request, "", [], "error", error=error)


def _live_experts(spec: ModelSpec, experts: ExpertArena | None) -> LiveExperts | None:
    if experts is None or (moe := spec.moe) is None:
        return None
    return LiveExperts(experts.cache, [expert_keys(moe, layer) for layer in moe.layers], moe.num_active)


class _SeedSequence:
    """Seeds for requests that bring none, reproducible from the configured one."""

    def __init__(self, seed: int) -> None:
        self._generator = torch.Generator().manual_seed(seed)

    def getrandbits(self, num_bits: int) -> int:
        return int(torch.randint(0, 2**num_bits - 1, (), generator=self._generator, dtype=torch.int64))


def _as_ids(token_id: int | None) -> tuple[int, ...]:
    return () if token_id is None else (token_id,)
