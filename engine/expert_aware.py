"""Expert-aware batching: how much a step holds, and which requests share it (design, section 7). No torch.

Depth: a step's prompt tokens and the number of running requests follow the measured costs and the latency targets.
Affinity: where not all running requests fit a step, those go together whose experts overlap, with one another's and
with what is in fast memory.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from engine.block_manager import BlockManager
from engine.config import SchedulerConfig
from engine.request import Request
from engine.scheduler import FcfsScheduler, SchedulerOutput
from engine.step_costs import StepCosts

_RESIDENT = 0.9  # what an expert that is in fast memory counts beside one that is not: it may not stay there
_NUM_CANDIDATES = 16  # waiting requests, the first ones, that are compared
_MIN_CHUNK = 32  # tokens of prompts in a step, whatever the targets say

Floats = NDArray[np.float32]


class ExpertView(Protocol):
    """What is known of the experts."""

    @property
    def is_short(self) -> bool:
        """Whether fast memory does not hold all of them."""
        ...

    def uses(self, requests: Sequence[Request]) -> Floats:
        """Expected uses per token of each expert by each request [N, K]."""
        ...

    def resident(self) -> NDArray[np.bool_]:
        """Whether each expert is in fast memory now [K]."""
        ...


def num_due(passed_over: Sequence[int], limit: int, size: int) -> int:
    """How many of those passed over most have to be in the next group of `size`, lest somebody be left out more than
    `limit` times in a row.

    In any j turns after this one j x size requests can be served; so of those that must be served within them, what
    is more than that is due now. Holds for ever if there are at most (limit + 1) x size requests.
    """
    slack = np.clip(limit - np.asarray(passed_over, dtype=np.int64), 0, None)
    within = np.cumsum(np.bincount(slack, minlength=limit + 1))
    return int(max(0, (within - size * np.arange(len(within))).max()))


def overlapping(uses: Floats, absent: Floats, chosen: list[int], size: int) -> list[int]:
    """`chosen` of the N candidates with others added greedily, those that add the fewest expected misses, up to `size`.

    uses [N, K]: chance of each expert's use in a step; absent [K]: what its use costs.
    """
    chosen = list(chosen)
    cost = absent * np.prod(1.0 - uses[chosen], axis=0)
    left = np.ones(len(uses), dtype=np.bool_)
    left[chosen] = False
    while len(chosen) < min(size, len(uses)):
        added = np.where(left, uses @ cost, np.inf)
        best = int(added.argmin())
        chosen.append(best)
        left[best] = False
        cost = cost * (1.0 - uses[best])
    return chosen


class ExpertAwareScheduler(FcfsScheduler):
    """First come, first served as long as all experts are in fast memory; beyond that by depth and affinity.

    Fair: no running request is left out of more than `max_passed_over` turns in a row, no waiting one is passed by
    more than that many others, and one past its latency target goes first.
    """

    def __init__(
        self,
        config: SchedulerConfig,
        blocks: BlockManager,
        experts: ExpertView | None = None,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        """`experts`: None where the model has none."""
        super().__init__(config, blocks)
        self._experts = experts
        self._clock = clock
        self._members: list[Request] = []  # of the group
        self._num_left = 0  # steps for which it stays
        self._passed_over: dict[Request, int] = {}  # turns, of running requests; passed by, of waiting ones
        self._since: dict[Request, float] = {}  # its arrival, then its last step
        self._costs = StepCosts()

    def add(self, request: Request) -> None:
        super().add(request)
        self._passed_over[request] = 0
        self._since[request] = self._clock()

    def remove(self, request: Request) -> None:
        super().remove(request)
        del self._passed_over[request], self._since[request]

    def took(self, output: SchedulerOutput, seconds: float) -> None:
        if not self._is_short:
            return
        decoding, prompt_tokens = _parts(output)
        self._costs.add(decoding, prompt_tokens, seconds)
        now = self._clock()
        for request in output.num_tokens:
            if request in self._since:
                self._since[request] = now

    @property
    def _is_short(self) -> bool:
        return self._experts is not None and self._experts.is_short

    # ---- affinity ----------------------------------------------------------------------------------------------------

    def _group(self) -> Sequence[Request]:
        size = self._config.step_seqs
        if size > 1 and self.waiting and len(self.running) < self._config.max_num_seqs:
            size -= 1  # a place for who may begin in this step
        if not self._is_short or len(self.running) <= size:
            self._members.clear()
            return self.running
        running = set(self.running)
        members = [request for request in self._members if request in running][:size]
        is_turn = self._num_left <= 0 or not members
        if is_turn:
            members = self._due(max(1, self._config.step_seqs - 1))[:size]
            self._num_left = self._config.quantum
        if len(members) < size:
            members = self._filled(members, size)
        if is_turn:
            for request in self.running:
                self._passed_over[request] += 1
            for request in members:
                self._passed_over[request] = 0
            self.num_passed_over += len(running) - len(members)
        self._num_left -= 1
        self._members = members
        chosen = set(members)
        return [request for request in self.running if request in chosen]

    def _due(self, size: int) -> list[Request]:
        """Who goes first: those passed over most, as many as must, then prompts that have begun, and who is late."""
        by_turns = sorted(self.running, key=lambda request: -self._passed_over[request])
        passed_over = [self._passed_over[request] for request in by_turns]
        num = num_due(passed_over, self._config.max_passed_over, size)
        limit, now = self._config.target_itl_s, self._clock()
        late = [r for r in by_turns[num:] if limit is not None and now - self._since[r] >= limit]
        begun = [r for r in by_turns[num:] if r.num_new_tokens > 1 and r not in late]
        return by_turns[:num] + sorted(late, key=lambda request: self._since[request]) + begun

    def _filled(self, members: list[Request], size: int) -> list[Request]:
        chosen = set(members)
        candidates = [*members, *(request for request in self.running if request not in chosen)]
        found = overlapping(self._uses(candidates), self._absent(), list(range(len(members))), size)
        return [candidates[i] for i in found]

    def _uses(self, requests: Sequence[Request]) -> Floats:
        assert self._experts is not None
        return np.minimum(self._experts.uses(requests), 1.0)

    def _absent(self) -> Floats:
        assert self._experts is not None
        absent: Floats = np.where(self._experts.resident(), np.float32(_RESIDENT), np.float32(1.0))
        return absent

    # ---- who begins --------------------------------------------------------------------------------------------------

    def _next_waiting(self) -> Request:
        first = self.waiting[0]
        if not self._is_short or not self.running or len(self.waiting) == 1:
            return first
        target = self._config.target_ttft_s
        is_late = target is not None and self._clock() - self._since[first] >= target
        if first.was_scheduled or is_late or self._passed_over[first] >= self._config.max_passed_over:
            return first
        candidates = [self.waiting[i] for i in range(min(len(self.waiting), _NUM_CANDIDATES))]
        running = self._uses(self.running)
        cost = self._absent() * np.prod(1.0 - running, axis=0)
        chosen = candidates[int((self._uses(candidates) @ cost).argmin())]
        passed_by = candidates[: candidates.index(chosen)]
        for request in passed_by:
            self._passed_over[request] += 1
        self.num_passed_over += len(passed_by)
        return chosen

    def _admitted(self, request: Request) -> None:
        self._passed_over[request] = 0
        if self._members:
            self._members.append(request)

    # ---- depth -------------------------------------------------------------------------------------------------------

    def _may_admit(self, output: SchedulerOutput) -> bool:
        config = self._config
        if not self._is_short:
            return super()._may_admit(output)
        if len(self.running) >= config.max_num_seqs or len(output.num_tokens) >= config.step_seqs:
            return False
        target = config.target_itl_s
        if target is None or not self.running or not self._costs.knows_decoding:
            return True
        late = config.target_ttft_s
        if late is not None and self._clock() - self._since[self.waiting[0]] >= late:
            return True
        num_turns = -(-(len(self.running) + 1) // config.step_seqs)
        return num_turns * self._costs.seconds(min(len(self.running) + 1, config.step_seqs), 0) <= target

    def _budget(self, group: Sequence[Request]) -> int:
        config = self._config
        if not self._is_short or not self._costs.knows_prompts:
            return config.max_num_batched_tokens
        decoding = sum(request.num_new_tokens == 1 for request in group)
        chunk = self._chunk(decoding)
        return max(len(group), decoding + max(_MIN_CHUNK, chunk))

    def _chunk(self, decoding: int) -> int:
        """Tokens of prompts: as many as make their compute worth streaming the experts, as the target allows."""
        config, costs = self._config, self._costs
        per_token = max(costs.prompt_token_s, 1e-9)
        most = max(config.max_num_batched_tokens, config.max_streamed_tokens)
        worth = min(most, max(config.max_num_batched_tokens, int(costs.stream_s / per_token)))
        if config.target_itl_s is None or not decoding:
            return worth
        spare = config.target_itl_s - costs.seconds(decoding, 0) - costs.stream_s
        if spare <= 0:  # any chunk is late: the fewest of them
            return worth
        return min(worth, int(spare / per_token))


def _parts(output: SchedulerOutput) -> tuple[int, int]:
    """-> how many requests decode, tokens of prompts."""
    decoding = sum(num == 1 for num in output.num_tokens.values())
    return decoding, output.total_num_tokens - decoding
