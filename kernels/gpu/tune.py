"""Finds the fastest tiles on the GPU that is here, among those that compute the same bits. Knows no clock."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from itertools import product
from math import prod
from typing import TypeVar

from kernels.gpu.attention import AttentionTile
from kernels.gpu.configs import KERNELS, VARIANTS, Configs, Tile, search_space

T = TypeVar("T")
A = TypeVar("A", Tile, AttentionTile)


@dataclass(frozen=True, slots=True)
class Trial:
    """One tile, tried. `bits` tells apart what tiles compute of the same rows."""

    seconds: float
    bits: str


@dataclass(frozen=True, slots=True)
class Work:
    """What a tile is tried on. Of attention `kernel` is that, and `format` the cache's dtype."""

    kernel: str
    format: str
    variant: str


Try = Callable[[Work, Tile | AttentionTile], Trial | None]  # None: it does not start here, or computes something wrong
Progress = Callable[[str, int, int], None]


@dataclass(slots=True)
class Tuned:
    """What was found, and of what nothing would run, so that the default stays."""

    configs: Configs
    gains: dict[Work, float | None] = field(
        default_factory=dict
    )  # the default's seconds over the chosen one's, if it ran
    failed: list[str] = field(default_factory=list)


def tune(
    defaults: Configs,
    formats: Sequence[str],
    dtypes: Sequence[str],
    attempt: Try,
    progress: Progress = lambda *_: None,
) -> Tuned:
    """Try all tiles worth trying for these formats of weights and dtypes of keys; others' stay as in `defaults`.

    Progress is told in trials.
    """
    tuned = Tuned(replace(defaults, tiles=dict(defaults.tiles), attention=dict(defaults.attention)))
    tried = _Attempts(attempt, progress, _num_trials(defaults, formats, dtypes))
    for kernel, format in product(KERNELS, formats):
        works = [Work(kernel, format, variant) for variant in VARIANTS]
        found = {work: tried.all(work, _tiles(defaults, work)) for work in works}
        chosen = choose([found[work] for work in works])
        if chosen is None:
            tuned.failed.append(f"{kernel}, {format}")
            continue
        for work, tile in zip(works, chosen, strict=True):
            default = defaults.tiles[kernel, format, work.variant]
            tuned.configs.tiles[kernel, format, work.variant] = tile
            tuned.gains[work] = _ratio(found[work], default, tile)
    for dtype in dtypes:
        works = [Work("attention", dtype, variant) for variant in VARIANTS]
        tiles = _attention_tiles(defaults, dtype)
        default_tile = tiles[0]
        of_attention = [tried.all(work, tiles) for work in works]
        best = choose_one(of_attention)
        if best is None:
            tuned.failed.append(f"attention, {dtype}")
            continue
        tuned.configs.attention[dtype] = asdict(best)
        for work, trials in zip(works, of_attention, strict=True):
            tuned.gains[work] = _ratio(trials, default_tile, best)
    return tuned


def choose(variants: Sequence[Mapping[T, Trial]]) -> tuple[T, ...] | None:
    """A tile for each variant, all computing the same bits; None if no bits are computed in every variant.

    The best are those whose times, each over its variant's fastest, have the least product.
    """
    shared = set.intersection(*({trial.bits for trial in trials.values()} for trials in variants))
    fastest = [min((trial.seconds for trial in trials.values()), default=1.0) for trials in variants]
    best: tuple[float, tuple[T, ...]] | None = None
    for bits in sorted(shared):
        tiles = tuple(
            min((trial.seconds, i, t) for i, (t, trial) in enumerate(trials.items()) if trial.bits == bits)[2]
            for trials in variants
        )
        cost = prod(trials[t].seconds / least for trials, t, least in zip(variants, tiles, fastest, strict=True))
        if best is None or cost < best[0]:
            best = cost, tiles
    return None if best is None else best[1]


def choose_one(variants: Sequence[Mapping[T, Trial]]) -> T | None:
    """The one tile for all variants, where bits depend on it: the least product of its times. None if none ran."""
    able = [tile for tile in variants[0] if all(tile in trials for trials in variants)]
    return min(able, key=lambda tile: prod(trials[tile].seconds for trials in variants), default=None)


def attention_space(dtype: str) -> Iterable[AttentionTile]:
    """Tiles worth trying for keys of that dtype. Some may not fit a GPU."""
    for rows, keys, num_warps, num_stages in product((16, 32, 64), (32, 64, 128), (4, 8), (1, 2, 3)):
        is_wide = rows * keys > 2048
        if is_wide == (num_warps == 8) and (dtype == "bf16" or rows * keys <= 4096):
            yield AttentionTile(rows, keys, num_warps, num_stages)


def _ratio(trials: Mapping[T, Trial], default: T, chosen: T) -> float | None:
    return trials[default].seconds / trials[chosen].seconds if default in trials else None


def _tiles(defaults: Configs, work: Work) -> list[Tile]:
    default = defaults.tiles[work.kernel, work.format, work.variant]
    return list(dict.fromkeys([default, *search_space(work.kernel, work.format, work.variant)]))


def _attention_tiles(defaults: Configs, dtype: str) -> list[AttentionTile]:
    return list(dict.fromkeys([AttentionTile(**defaults.attention[dtype]), *attention_space(dtype)]))


def _num_trials(defaults: Configs, formats: Sequence[str], dtypes: Sequence[str]) -> int:
    works = [Work(*names) for names in product(KERNELS, formats, VARIANTS)]
    of_attention = sum(len(_attention_tiles(defaults, dtype)) for dtype in dtypes)
    return sum(len(_tiles(defaults, work)) for work in works) + len(VARIANTS) * of_attention


class _Attempts:
    def __init__(self, attempt: Try, progress: Progress, total: int) -> None:
        self._attempt = attempt
        self._progress = progress
        self._total = total
        self._num_done = 0

    def all(self, work: Work, tiles: Sequence[A]) -> dict[A, Trial]:
        """Those of the tiles that ran."""
        found: dict[A, Trial] = {}
        for tile in tiles:
            trial = self._attempt(work, tile)
            if trial is not None:
                found[tile] = trial
            self._num_done += 1
            self._progress("tuning", self._num_done, self._total)
        return found
