"""How a device's memory is shared between keys and values and experts: by what it brings in tokens a second. Pure."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Rates:
    """Measured, in bytes a second."""

    memory: float  # of the device, read
    link: float  # up to it


@dataclass(frozen=True, slots=True, kw_only=True)
class Need:
    """What a model and those who use it ask of memory."""

    record_nbytes: int
    num_layers: int  # with experts
    num_experts: int  # of each
    num_active: int
    dense_nbytes: int  # that every step reads
    kv_token_nbytes: float
    context: int  # tokens of a request that runs, on average
    longest: int  # tokens of the longest one: that many must fit
    max_seqs: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Split:
    """`tokens_per_s` is what was compared, of decode, and no promise."""

    kv_nbytes: int
    num_slots: int
    num_seqs: int  # that run at once
    tokens_per_s: float


def split_memory(nbytes: int, need: Need, rates: Rates, hit_rate: Callable[[int], float]) -> Split | None:
    """The best share of `nbytes`; None if not even one request and one expert fit.

    More keys and values let more requests share a step's dense weights and experts; more experts spare reads.
    `hit_rate`: of a token's experts with so many slots.
    """
    best: Split | None = None
    for num_seqs in range(1, need.max_seqs + 1):
        kv_nbytes = int(max(num_seqs * need.context, need.longest) * need.kv_token_nbytes)
        num_slots = min((nbytes - kv_nbytes) // need.record_nbytes, need.num_layers * need.num_experts)
        if num_slots < 1:
            break
        speed = num_seqs / step_s(num_seqs, hit_rate(num_slots), need, rates)
        if best is None or speed > best.tokens_per_s:
            best = Split(kv_nbytes=kv_nbytes, num_slots=num_slots, num_seqs=num_seqs, tokens_per_s=speed)
    return best


def step_s(num_seqs: int, hit_rate: float, need: Need, rates: Rates) -> float:
    """Seconds of a step of decode: what it reads of the device's memory, and beside that what it misses."""
    distinct = need.num_experts * (1.0 - (1.0 - need.num_active / need.num_experts) ** num_seqs)
    experts_nbytes = need.num_layers * distinct * need.record_nbytes
    kv_nbytes = num_seqs * need.context * need.kv_token_nbytes
    read_s = (need.dense_nbytes + experts_nbytes + kv_nbytes) / rates.memory
    return read_s + experts_nbytes * (1.0 - hit_rate) / rates.link
