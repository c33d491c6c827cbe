"""What is told of a recorded workload, as plain numbers. Knows not how they come about nor how they are shown."""

from __future__ import annotations

import msgspec


class SegmentCache(msgspec.Struct, frozen=True, kw_only=True):
    """SCH(window, ratio): hit rate of a cache of `ratio` times one token's experts."""

    ratio: float
    hit_rate: float


class Layer(msgspec.Struct, frozen=True, kw_only=True):
    """Popularity in a layer. `effective` is exp of the entropy of the uses: E if all experts are used alike."""

    layer: int
    popularity: list[float]  # [E] share of the tokens that use it
    top_expert: int
    top_quarter: float  # share of the uses that the quarter of the experts takes that is used most
    effective: float
    unused: int


class Reuse(msgspec.Struct, frozen=True, kw_only=True):
    """Of each use: tokens since the same request last had the layer use the expert. Shares are of all uses."""

    bin_ends: list[int]  # tokens, inclusive
    shares: list[float]  # one a bin
    shares_by_chance: list[float]  # if each token drew by the popularity alone
    first: float  # uses that are a request's first of that expert
    first_by_chance: float
    percentiles: dict[str, int | None]  # tokens, of the uses that are not first


class WorkingSet(msgspec.Struct, frozen=True, kw_only=True):
    """Distinct experts of all layers that a request uses, means over the requests of a domain that are so long."""

    domain: str | None  # None: all requests
    num_requests: int
    mean_tokens: float
    first: list[float | None]  # for each of `set_lengths`
    whole: float


class Overlap(msgspec.Struct, frozen=True, kw_only=True):
    """How alike two requests are (`cache.overlap.Likeness`); by chance: with the experts of each request renamed."""

    num_compared: int
    domains: list[str]
    jaccard: list[list[float | None]]  # [D][D]
    weighted: list[list[float | None]]  # [D][D]
    within: dict[str, float | None]  # by measure, requests of one domain
    within_by_chance: dict[str, float | None]
    between: dict[str, float | None]  # requests of different domains
    between_by_chance: dict[str, float | None]


class Batch(msgspec.Struct, frozen=True, kw_only=True):
    """Distinct experts of a layer that so many tokens use together; None where requests are too few or too short."""

    num_tokens: int
    of_requests: float | None  # a token each of as many requests
    in_a_row: float | None  # tokens of one request, following each other
    uniform: float


class Size(msgspec.Struct, frozen=True, kw_only=True):
    """Hit rates of a cache, by policy, from an empty one. A phase without queries has none."""

    num_slots: int
    share: float  # of all experts
    of_active: float  # in experts of one token, all layers
    hit_rate: dict[str, float]
    prefill_hit_rate: dict[str, float | None]
    decode_hit_rate: dict[str, float | None]


class Judgement(msgspec.Struct, frozen=True, kw_only=True):
    """`cache.curve.Verdict`, by numbers of slots."""

    best_slots: int
    enough_slots: int
    nothing_more: bool
    helps: bool
    working_slots: int | None


class Workload(msgspec.Struct, frozen=True, kw_only=True):
    """A trace, measured."""

    num_requests: int
    num_tokens: int
    num_layers: int
    num_experts: int  # of a layer
    num_active: int  # of a layer, for a token
    window: int
    srp: float
    sch: list[SegmentCache]
    specialisation: float | None  # None of one domain
    layers: list[Layer]
    reuse: Reuse
    set_lengths: list[int]
    working_sets: list[WorkingSet]  # all requests, then each domain
    overlap: Overlap
    batches: list[Batch]
    concurrency: int
    replayed_requests: int
    replayed_tokens: int
    replayed_whole: bool  # requests; else only the beginnings of them
    curve: list[Size]  # ascending, the last with room for all experts
    judgement: Judgement

    @property
    def num_keys(self) -> int:
        """Experts of all layers."""
        return self.num_layers * self.num_experts

    @property
    def active_keys(self) -> int:
        """Experts that one token uses, of all layers."""
        return self.num_layers * self.num_active
