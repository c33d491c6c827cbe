"""A scheduler over recorded routing: the steps that an engine would run. Computes nothing; knows no tensors."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

from cache.expert_key import ExpertKey
from cache.replay import Replay, ReplayResult, Step, make_policy
from cache.trace import RoutingTrace
from engine.block_manager import BlockManager
from engine.config import SchedulerConfig
from engine.detokenizer import Detokenizer
from engine.request import Request
from engine.sampling_params import SamplingParams
from engine.scheduler import SchedulerOutput
from engine.schedulers import SCHEDULERS
from engine.signatures import ExpertSignatures

_BLOCK_SIZE = 1 << 30  # tokens: KV memory is no limit, and no prefix is shared


class ScheduledTrace:
    """All requests of a trace are there from the start, and end as they did; prompts come in chunks.

    The scheduler learns of each step's routing when the next one is asked for, as it does from an engine.
    """

    def __init__(
        self, trace: RoutingTrace, config: SchedulerConfig, resident: Callable[[], Collection[ExpertKey]]
    ) -> None:
        """`resident`: the experts in fast memory, at any time."""
        self.now_s = 0.0  # the consumer's clock; it goes on between two steps
        self._trace = trace
        self._resident = resident
        self._keys = [ExpertKey(layer, e) for layer in trace.layers for e in range(trace.num_experts)]
        self._signatures = ExpertSignatures(len(trace.layers), trace.num_experts, trace.ids.shape[2])
        self._scheduler = SCHEDULERS[config.policy](
            config, BlockManager(trace.num_requests, _BLOCK_SIZE), self, lambda: self.now_s
        )
        for number in range(trace.num_requests):
            if trace.seq_off[number + 1] > trace.seq_off[number]:
                self._add(number)

    @property
    def num_waiting(self) -> int:
        return len(self._scheduler.waiting)

    is_short = True

    def uses(self, requests: Sequence[Request]) -> NDArray[np.float32]:
        numbers = [request.number for request in requests]
        if self._trace.token_ids is None:
            return self._signatures.uses(numbers)
        return self._signatures.uses(numbers, [request.next_token_id for request in requests])

    def resident(self) -> NDArray[np.bool_]:
        resident = self._resident()
        return np.fromiter((key in resident for key in self._keys), dtype=np.bool_, count=len(self._keys))

    def steps(self) -> Iterator[Step]:
        """Until all requests have ended."""
        while self._scheduler.has_work:
            output = self._scheduler.schedule()
            step = self._step(output)
            began_s = self.now_s
            yield step
            tokens = self._tokens(step.rows)
            self._signatures.observe(step.requests, tokens, self._trace.ids[step.rows])
            self._scheduler.update(output)
            for request in output.num_tokens:
                if self._row(request) == self._trace.seq_off[request.number + 1]:
                    self._scheduler.remove(request)
                    self._signatures.ended(request.number)
                elif request.num_new_tokens == 0:
                    request.token_ids += self._tokens([self._row(request)])
            self._scheduler.took(output, self.now_s - began_s)

    def _add(self, number: int) -> None:
        first = int(self._trace.seq_off[number])
        prompt = self._tokens(range(first, first + max(1, int(self._trace.num_prompt[number]))))
        nothing = Detokenizer(None, [])  # type: ignore[arg-type]  # no text comes of it
        request = Request(str(number), prompt, len(prompt), SamplingParams(), 1 << 40, 0, nothing, number)
        if self._trace.token_ids is not None:
            self._signatures.expect(number, prompt)
        self._scheduler.add(request)

    def _step(self, output: SchedulerOutput) -> Step:
        step = Step()
        for request, num in output.num_tokens.items():
            row = self._row(request)
            step.rows += range(row, row + num)
            step.requests += [request.number] * num
            step.is_prefill |= num > 1
            if row + num == self._trace.seq_off[request.number + 1]:
                step.ended.append(request.number)
        return step

    def _row(self, request: Request) -> int:
        """The first that is not computed."""
        return int(self._trace.seq_off[request.number]) + request.num_computed_tokens

    def _tokens(self, rows: Sequence[int]) -> list[int]:
        """Their ids; the rows' own numbers where the trace has none, so that no two are alike."""
        if self._trace.token_ids is None:
            return list(rows)
        return [int(token) for token in self._trace.token_ids[list(rows)]]


def replay_scheduled(
    trace: RoutingTrace, policy: str, num_slots: int, config: SchedulerConfig, *, while_waiting: bool = False
) -> tuple[ReplayResult, int]:
    """Replay what the scheduler would run, as `cache.replay.replay` does; -> totals, tokens computed.

    while_waiting: stop when no request waits any more, so that as many as may run do so to the end. Raises
    `ValueError` for an unknown policy, no slots, or belady: what comes depends on what is in the cache.
    """
    if policy == "belady":
        raise ValueError("belady must know the steps, which depend on what it keeps")
    books = Replay(trace, make_policy(policy, num_slots, trace, lambda: ()), num_slots)
    scheduled = ScheduledTrace(trace, config, lambda: books.resident)
    num_tokens = 0

    def counted() -> Iterator[Step]:
        nonlocal num_tokens
        for step in scheduled.steps():
            if while_waiting and not scheduled.num_waiting:
                return
            num_tokens += len(step.rows)
            yield step

    return books.run(policy, counted()), num_tokens
