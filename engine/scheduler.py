"""Who runs in the next step, and with how many tokens. No phases: a request's computed tokens catch up. No torch."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from engine.block_manager import BlockManager
from engine.config import SchedulerConfig
from engine.request import Request


@dataclass(slots=True)
class SchedulerOutput:
    """One step: the number of tokens to compute for each request, in batch order."""

    num_tokens: dict[Request, int] = field(default_factory=dict)

    @property
    def total_num_tokens(self) -> int:
        return sum(self.num_tokens.values())

    def requests_of(self, rows: Sequence[int]) -> list[Request]:
        """Those whose tokens these rows of the batch are."""
        requests, first_row = [], 0
        for request, num_tokens in self.num_tokens.items():
            if any(first_row <= row < first_row + num_tokens for row in rows):
                requests.append(request)
            first_row += num_tokens
        return requests

    def halved(self) -> SchedulerOutput:
        """The first half of its tokens: a step that can be computed in its place."""
        left = self.total_num_tokens // 2
        half = SchedulerOutput()
        for request, num_tokens in self.num_tokens.items():
            if left > 0:
                half.num_tokens[request] = min(num_tokens, left)
                left -= num_tokens
        return half


class FcfsScheduler:
    """First come, first served: running requests keep running, waiting ones join in their order.

    When KV memory is full the newest running request is preempted: its blocks are freed, its tokens are kept, and it
    is computed again from the front of the queue, with the same result.
    """

    def __init__(self, config: SchedulerConfig, blocks: BlockManager) -> None:
        self._config = config
        self._blocks = blocks
        self.running: list[Request] = []  # oldest first
        self.waiting: deque[Request] = deque()
        self.num_preemptions = 0
        self.num_passed_over = 0  # times that one request was left out in favour of another
        self.num_prefix_queries = 0  # prompt tokens looked up
        self.num_prefix_hits = 0

    @property
    def has_work(self) -> bool:
        return bool(self.running or self.waiting)

    @property
    def requests(self) -> Iterator[Request]:
        yield from self.running
        yield from self.waiting

    def add(self, request: Request) -> None:
        self.waiting.append(request)

    def remove(self, request: Request) -> None:
        """A request ended, wherever it was; its blocks are free at once."""
        if request in self.running:
            self.running.remove(request)
        else:
            self.waiting.remove(request)
        self._blocks.free(request)

    def schedule(self) -> SchedulerOutput:
        """Choose the next step; empty only if there is no work."""
        output = SchedulerOutput()
        group = list(self._group())
        budget = self._budget(group)
        preempted = False
        for i, request in enumerate(group):
            num_behind = len(group) - i - 1  # each of them gets a token too, whatever this one's backlog
            num_tokens = min(request.num_new_tokens, budget - num_behind)
            if not request.block_ids or num_tokens <= 0:  # preempted just now, or nothing is left for it
                continue
            while not self._blocks.allocate(request, request.num_computed_tokens + num_tokens):
                victim = self._newest(but=output)
                self._preempt(victim)
                preempted = True
                if victim is request:
                    break
            else:
                output.num_tokens[request] = num_tokens
                budget -= num_tokens
        while self.waiting and not preempted and budget > 0 and self._may_admit(output):
            request = self._next_waiting()
            num_reused = 0 if request.wants_scores else self._blocks.reuse_prefix(request)
            num_tokens = min(request.num_tokens - num_reused, budget)
            if not self._blocks.allocate(request, num_reused + num_tokens):
                self._blocks.free(request)
                break
            self.waiting.remove(request)
            self.running.append(request)
            self._admitted(request)
            request.num_computed_tokens = num_reused
            if not request.was_scheduled:
                request.was_scheduled = True
                request.num_cached_tokens = num_reused
                self.num_prefix_queries += 0 if request.wants_scores else request.num_prompt_tokens
                self.num_prefix_hits += num_reused
            output.num_tokens[request] = num_tokens
            budget -= num_tokens
        return output

    def update(self, output: SchedulerOutput) -> None:
        """The step was computed: its KV is there."""
        for request, num_tokens in output.num_tokens.items():
            request.num_computed_tokens += num_tokens
            self._blocks.commit(request)

    def took(self, output: SchedulerOutput, seconds: float) -> None:
        """The step took so long, routing, loads and sampling in it."""

    def check_integrity(self) -> None:
        """Raise `AssertionError` if requests and blocks do not add up."""
        self._blocks.check_integrity(list(self.requests))
        if any(request.block_ids for request in self.waiting):
            raise AssertionError("a waiting request holds blocks")

    def _group(self) -> Sequence[Request]:
        """The running requests that are in the next step, oldest first."""
        return self.running

    def _budget(self, group: Sequence[Request]) -> int:
        """Tokens of the next step, one at least for each of the group."""
        return self._config.max_num_batched_tokens

    def _may_admit(self, output: SchedulerOutput) -> bool:
        """Whether one more request may begin in this step."""
        return len(self.running) < min(self._config.max_num_seqs, self._config.step_seqs)

    def _next_waiting(self) -> Request:
        """Which of the waiting ones."""
        return self.waiting[0]

    def _admitted(self, request: Request) -> None:
        """It runs from now on."""

    def _newest(self, but: SchedulerOutput) -> Request:
        """The newest running request that is not in this step yet."""
        return next(request for request in reversed(self.running) if request not in but.num_tokens)

    def _preempt(self, request: Request) -> None:
        self.running.remove(request)
        self._blocks.free(request)
        request.num_computed_tokens = 0
        self.waiting.appendleft(request)
        self.num_preemptions += 1
