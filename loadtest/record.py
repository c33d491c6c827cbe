"""What became of the requests of a load test, and its figures: a `LoadResult`, as JSON or as a table."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection
from dataclasses import dataclass, field

import msgspec

from server.measures import Answer, Figures, Spread, figures, spread


class LoadResult(Figures, frozen=True, kw_only=True):
    """`num_requests` are those that were answered or failed; cancelled and refused ones are counted apart.

    `wall_s` is from the first request due to the end of the last stream.
    """

    scenario: str
    rate: float | None
    users: int | None  # of a closed loop
    num_cancelled: int  # by us, on purpose
    refusals: dict[str, int]  # status that was said to be expected -> times
    codes: dict[str, int]  # status, or what failed without one -> times, of all that was not cancelled
    lateness_s: Spread  # how long after they were due requests were sent: if not small, this machine is too slow
    per_domain: dict[str, Figures]

    @property
    def is_clean(self) -> bool:
        """Nothing failed, and there was something that could."""
        return self.num_errors == 0 and (self.num_requests > 0 or self.num_cancelled > 0)


@dataclass(slots=True)
class Record:
    """Filled by the requests as they end. `expected`: codes that are refusals, not errors."""

    expected: Collection[str] = ()
    answers: list[tuple[str, Answer]] = field(default_factory=list)
    errors: Counter[tuple[str, str]] = field(default_factory=Counter)  # (domain, message)
    refusals: Counter[str] = field(default_factory=Counter)
    codes: Counter[str] = field(default_factory=Counter)
    num_cancelled: int = 0
    lateness_s: list[float] = field(default_factory=list)
    started_at: float | None = None
    ended_at: float = 0.0

    def answered(self, domain: str, answer: Answer) -> None:
        self.answers.append((domain, answer))
        self.codes["200"] += 1
        self._lasted(answer.sent_at, answer.ended_at)

    def failed(self, domain: str, code: str, message: str, sent_at: float, ended_at: float) -> bool:
        """Whether that was an error, and not a refusal that was expected."""
        self.codes[code] += 1
        self._lasted(sent_at, ended_at)
        if code in self.expected:
            self.refusals[code] += 1
            return False
        self.errors[domain, message] += 1
        return True

    def cancelled(self, sent_at: float, ended_at: float) -> None:
        self.num_cancelled += 1
        self._lasted(sent_at, ended_at)

    def result(self, scenario: str, *, rate: float | None, users: int | None) -> LoadResult:
        wall_s = max(self.ended_at - (self.started_at or 0.0), 1e-9)
        domains = {domain for domain, _ in self.answers} | {domain for domain, _ in self.errors}
        everything = figures([a for _, a in self.answers], wall_s, self._errors_of(domains))
        apart = {
            domain: figures([a for d, a in self.answers if d == domain], wall_s, self._errors_of({domain}))
            for domain in sorted(domains - {""})
        }
        return LoadResult(
            scenario=scenario,
            rate=rate,
            users=users,
            num_cancelled=self.num_cancelled,
            refusals=dict(self.refusals),
            codes=dict(sorted(self.codes.items())),
            lateness_s=spread(self.lateness_s),
            per_domain=apart,
            **msgspec.structs.asdict(everything),
        )

    def _errors_of(self, domains: set[str]) -> Counter[str]:
        errors: Counter[str] = Counter()
        for (domain, message), times in self.errors.items():
            if domain in domains:
                errors[message] += times
        return errors

    def _lasted(self, sent_at: float, ended_at: float) -> None:
        self.started_at = sent_at if self.started_at is None else min(self.started_at, sent_at)
        self.ended_at = max(self.ended_at, ended_at)


def table(r: LoadResult) -> str:
    """For people: percentiles first, then what was not answered and why."""
    load = f"{r.rate:g} requests/s" if r.rate is not None else f"{r.users} users" if r.users else "bursts"
    lines = [
        f"{r.scenario}, {load}, {r.wall_s:.1f} s: {r.num_requests - r.num_errors} answered, {r.num_errors} failed, "
        f"{sum(r.refusals.values())} refused as expected, {r.num_cancelled} cancelled by us",
        f"output {r.output_tokens_per_s:.1f} tokens/s",
        f"{'':32} {'mean':>9} {'p50':>9} {'p90':>9} {'p99':>9}",
        *_rows("", r),
    ]
    for domain, apart in r.per_domain.items():
        lines += _rows(f"{domain}: ", apart)
    lines.append("by code: " + (", ".join(f"{code} {times}" for code, times in r.codes.items()) or "none"))
    if r.num_cached_tokens:
        lines.append(f"{r.num_cached_tokens} prompt tokens were in the server's prefix cache")
    if r.lateness_s.p99 > 0.05:
        lines.append(f"late: 1 in 100 requests was sent {r.lateness_s.p99 * 1e3:.0f} ms after it was due, or later")
    for message, times in sorted(r.errors.items(), key=lambda item: -item[1])[:5]:
        lines.append(f"error: {times} x {message}")
    return "\n".join(lines)


def _rows(prefix: str, of: Figures) -> list[str]:
    return [
        f"{prefix + what:32} " + " ".join(f"{value * 1e3:9.1f}" for value in (s.mean, s.p50, s.p90, s.p99))
        for what, s in (
            ("first token, ms", of.ttft_s),
            ("between tokens, ms", of.inter_token_s),
            ("whole answer, ms", of.latency_s),
        )
    ]
