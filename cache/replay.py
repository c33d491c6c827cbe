"""A recorded routing through a policy, layer call by layer call as the engine runs. Counts hits; reads no expert."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from functools import partial

from cache.expert_key import ExpertKey
from cache.policies import POLICIES
from cache.policies.belady import BeladyPolicy
from cache.policies.policy import Policy
from cache.stats import PhaseStats
from cache.trace import RoutingTrace

REPLAY_POLICIES: dict[str, type[Policy]] = {**POLICIES, "belady": BeladyPolicy}


@dataclass(frozen=True, slots=True)
class ReplayResult:
    """Totals of one replay. A query is one expert asked for by one layer in one step."""

    policy: str
    num_slots: int
    prefill: PhaseStats  # steps with a prompt chunk in them
    decode: PhaseStats
    num_fetches: int
    num_steps: int
    num_calls: int  # layer calls
    decision_s: float  # in the policy and in the replay's own books

    @property
    def num_queries(self) -> int:
        return self.prefill.queries + self.decode.queries

    @property
    def hit_rate(self) -> float:
        """Of both phases; 0 of no queries."""
        return (self.prefill.hits + self.decode.hits) / max(1, self.num_queries)


@dataclass(slots=True)
class Step:
    """The tokens of one step: rows of the trace, and the request of each."""

    rows: list[int] = field(default_factory=list)
    requests: list[int] = field(default_factory=list)
    is_prefill: bool = False
    ended: list[int] = field(default_factory=list)  # requests whose last token it has


def schedule(trace: RoutingTrace, concurrency: int = 1, prefill_chunk: int = 512) -> Iterator[Step]:
    """The steps of `concurrency` requests at a time, each giving way to the next when it ends.

    A request puts one token into a step, of its prompt up to `prefill_chunk` less what others' prompts take.
    """
    if concurrency < 1 or prefill_chunk < 1:
        raise ValueError("concurrency and prefill chunk must be at least 1")
    offsets, num_prompt = trace.seq_off.tolist(), trace.num_prompt.tolist()
    waiting = (r for r in range(trace.num_requests) if offsets[r + 1] > offsets[r])
    running: dict[int, int] = {}  # request -> its next row
    while True:
        while len(running) < concurrency and (following := next(waiting, None)) is not None:
            running[following] = offsets[following]
        if not running:
            return
        step, budget = Step(), prefill_chunk
        for request, row in list(running.items()):
            prompt_left = offsets[request] + num_prompt[request] - row
            num = 1 if prompt_left <= 0 else min(prompt_left, budget)
            if prompt_left > 0:
                budget -= num
                step.is_prefill |= num > 0
            step.rows += range(row, row + num)
            step.requests += [request] * num
            running[request] = row + num
            if row + num == offsets[request + 1]:
                step.ended.append(request)
                del running[request]
        yield step


def replay(
    trace: RoutingTrace,
    policy: str,
    num_slots: int,
    *,
    concurrency: int = 1,
    prefill_chunk: int = 512,
    clock: Callable[[], float] = time.perf_counter,
) -> ReplayResult:
    """Replay with `num_slots` slots, empty at the start. Raises `ValueError` for an unknown policy or no slots.

    The books are those of `ExpertCache`: the experts of a layer call that are resident are pinned first, then each
    miss takes a free slot or a victim's; when all slots are pinned, what was fetched is computed and let go.
    """
    steps = partial(schedule, trace, concurrency, prefill_chunk)
    return Replay(trace, make_policy(policy, num_slots, trace, steps), num_slots, clock).run(policy, steps())


def make_policy(name: str, num_slots: int, trace: RoutingTrace, steps: Callable[[], Iterable[Step]]) -> Policy:
    """A policy for the trace; `belady` foresees the steps. Raises `ValueError` for an unknown name or no slots."""
    if name not in REPLAY_POLICIES:
        raise ValueError(f"unknown cache policy {name!r}; known: {', '.join(sorted(REPLAY_POLICIES))}")
    if num_slots < 1:
        raise ValueError("a cache needs at least one slot")
    policy = REPLAY_POLICIES[name](num_slots, trace.layers, trace.num_experts)
    if isinstance(policy, BeladyPolicy):
        policy.foresee(_uses(trace, steps()))
    return policy


class Books:
    """Who has a slot, as a policy decides it: those of `ExpertCache`, without bytes and without prefetch."""

    def __init__(self, policy: Policy, num_slots: int, resident: Iterable[ExpertKey] = ()) -> None:
        """`resident`: who has one from the start."""
        self._policy = policy
        self.resident = set(resident)
        self.num_free = num_slots - len(self.resident)

    def ask(self, wanted: Iterable[ExpertKey]) -> int:
        """A layer call asks for distinct experts; -> hits."""
        found: list[ExpertKey] = []
        missing: list[ExpertKey] = []
        for key in wanted:
            (found if key in self.resident else missing).append(key)
        for key in found:
            self._policy.touch(key)
        if missing:
            self._fetch(missing, set(found))
        return len(found)

    def _fetch(self, missing: list[ExpertKey], pinned: set[ExpertKey]) -> None:
        policy, resident = self._policy, self.resident

        def evictable(key: ExpertKey) -> bool:
            return key not in pinned

        for key in missing:
            if self.num_free:
                self.num_free -= 1
            else:
                victim = policy.victim(evictable)
                if victim is None:  # the next wave: what the last one held is computed
                    pinned.clear()
                    victim = policy.victim(evictable)
                    assert victim is not None
                policy.remove(victim)
                resident.remove(victim)
            policy.insert(key)
            resident.add(key)
            pinned.add(key)


class Replay:
    """One replay: its books, and what `run` counts."""

    def __init__(
        self, trace: RoutingTrace, policy: Policy, num_slots: int, clock: Callable[[], float] = time.perf_counter
    ) -> None:
        self._trace = trace
        self._policy = policy
        self._clock = clock
        self._books = Books(policy, num_slots)
        self.resident = self._books.resident
        self._keys = [[ExpertKey(layer, e) for e in range(trace.num_experts)] for layer in trace.layers]

    def run(self, name: str, steps: Iterator[Step]) -> ReplayResult:
        queries, hits = [0, 0], [0, 0]  # decode, prefill
        num_steps = num_calls = 0
        decision_s = 0.0
        clock, ask = self._clock, self._books.ask
        observe, ended = self._policy.observe, self._policy.ended
        for step in steps:
            num_steps += 1
            phase = int(step.is_prefill)
            first = step.rows[0]
            if len(step.rows) == 1:
                routed = self._trace.ids[first : first + 1].swapaxes(0, 1).tolist()  # [L, tokens, k]
            else:
                routed = self._trace.ids[step.rows].swapaxes(0, 1).tolist()
            for layer, keys, chosen in zip(self._trace.layers, self._keys, routed, strict=True):
                wanted = dict.fromkeys(chosen[0] if len(chosen) == 1 else sorted({e for row in chosen for e in row}))
                started = clock()
                observe(layer, step.requests, chosen, step.is_prefill)
                num_hits = ask([keys[e] for e in wanted])
                decision_s += clock() - started
                queries[phase] += len(wanted)
                hits[phase] += num_hits
                num_calls += 1
            for request in step.ended:
                ended(request)
        return ReplayResult(
            policy=name,
            num_slots=self._books.num_free + len(self._books.resident),
            prefill=PhaseStats(queries=queries[1], hits=hits[1]),
            decode=PhaseStats(queries=queries[0], hits=hits[0]),
            num_fetches=sum(queries) - sum(hits),
            num_steps=num_steps,
            num_calls=num_calls,
            decision_s=decision_s,
        )


def _uses(trace: RoutingTrace, steps: Iterable[Step]) -> dict[ExpertKey, list[int]]:
    """The layer calls, numbered in order, that use each expert."""
    uses: dict[ExpertKey, list[int]] = {}
    keys = [[ExpertKey(layer, e) for e in range(trace.num_experts)] for layer in trace.layers]
    call = 0
    for step in steps:
        for of_layer, chosen in zip(keys, trace.ids[step.rows].swapaxes(0, 1).tolist(), strict=True):
            for e in {e for row in chosen for e in row}:
                uses.setdefault(of_layer[e], []).append(call)
            call += 1
    return uses
