"""An analysed workload in words and tables. Knows the numbers, not where they come from."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import msgspec

from cache.workload import Size, Workload
from engine.config import format_nbytes

_MOST_DOMAINS = 12  # in the table of their overlap


class Analysis(msgspec.Struct, frozen=True, kw_only=True):
    """What `--json` prints and the page shows. Rates and shares are fractions."""

    trace: str
    expert_nbytes: int | None
    advice: str
    workload: Workload


def advice(of: Workload, expert_nbytes: int | None) -> str:
    """One sentence on how large a cache this workload deserves."""
    judged = of.judgement
    by_slots = {size.num_slots: size for size in of.curve}
    best, enough, most = by_slots[judged.best_slots], by_slots[judged.enough_slots], of.curve[-1]
    tried = of.curve[:-1] or of.curve
    if not judged.helps:
        half = min(tried, key=lambda size: abs(size.share - 0.5))
        return (
            f"Caching helps little here: {_cache(of, half, expert_nbytes)} hits {_rate(half):.0%}, hardly more than "
            f"its share of all experts."
        )
    if tried[-1].num_slots < of.active_keys and most.num_slots > of.active_keys:
        return (
            f"None of the sizes replayed holds the {of.active_keys} experts of one token, below which LRU hits "
            f"nothing and segment {_rate(tried[-1]):.0%} at most: give the cache that many at least."
        )
    if judged.nothing_more:
        beyond = "nothing more is gained"
    elif 2 * enough.num_slots >= of.num_keys:
        beyond = f"all {of.num_keys} would gain {100 * (_rate(most) - _rate(enough)):.1f} points more"
    else:
        beyond = "twice as much gains less than two points"
    if judged.best_slots >= judged.enough_slots:
        return f"{_capital(_cache(of, enough, expert_nbytes))} hits {_rate(enough):.0%}; beyond it {beyond}."
    first = f"{_capital(_cache(of, best, expert_nbytes))} hits {_rate(best):.0%}"
    if enough is most:
        last = by_slots[tried[-1].num_slots]
        more = "" if last is best else f", one of {_room(last, expert_nbytes)} {_rate(last):.0%}"
        return f"{first}{more}; every expert more pays, up to all {_room(most, expert_nbytes)}."
    return f"{first}; beyond {_room(enough, expert_nbytes)}, which hit {_rate(enough):.0%}, {beyond}."


def _rate(size: Size) -> float:
    return size.hit_rate["segment"]


def _capital(text: str) -> str:
    return text[0].upper() + text[1:]


def _cache(of: Workload, size: Size, expert_nbytes: int | None) -> str:
    nbytes = "" if expert_nbytes is None else f", {format_nbytes(size.num_slots * expert_nbytes)}"
    return f"a cache of {size.of_active:.3g}x one token's experts ({size.num_slots} of {of.num_keys}{nbytes})"


def _room(size: Size, expert_nbytes: int | None) -> str:
    nbytes = "" if expert_nbytes is None else f" ({format_nbytes(size.num_slots * expert_nbytes)})"
    return f"{size.num_slots} experts{nbytes}"


def text(of: Analysis) -> str:
    """All of it, the advice last."""
    w = of.workload
    parts: list[Iterable[str]] = [_head(of), _locality(w), _reuse(w), _popularity(w), _working_sets(w)]
    parts += [_overlap(w), _batches(w), _curve(of), [of.advice]]
    return "\n\n".join("\n".join(lines) for lines in map(list, parts) if lines)


def _head(of: Analysis) -> Iterator[str]:
    w = of.workload
    domains = f", {len(w.overlap.domains)} domains" if len(w.overlap.domains) > 1 else ""
    yield (
        f"{_plain(of.trace)}: {w.num_requests} requests, {w.num_tokens} tokens{domains}; {w.num_layers} layers, "
        f"{w.num_active} of {w.num_experts} experts a token: {w.active_keys} of {w.num_keys}"
    )


def _locality(w: Workload) -> Iterator[str]:
    yield f"local routing, {w.window} tokens in a row"
    yield f"  SRP  {w.srp:.1%}  of one set of experts for all of them"
    for sch in w.sch:
        yield f"  SCH  {sch.hit_rate:.1%}  hits of a cache of {sch.ratio:g}x one token's experts that knows them"
    if w.specialisation is not None:
        yield f"  {w.specialisation:.1%} of a domain's uses are of other experts than the domains' mean"


def _reuse(w: Workload) -> Iterator[str]:
    r = w.reuse
    starts = [1, *(end + 1 for end in r.bin_ends)]
    bins = [f"{a}" if a == b else f"{a}-{b}" for a, b in zip(starts, r.bin_ends, strict=False)]
    yield "reuse distance: tokens since the same request last used the expert in the layer; shares of all uses"
    yield from _table(
        ["", *bins, "first"],
        [
            ["seen", *(f"{x:.1%}" for x in (*r.shares, r.first))],
            ["by chance", *(f"{x:.1%}" for x in (*r.shares_by_chance, r.first_by_chance))],
        ],
    )
    if r.percentiles["p50"] is not None:
        yield "  of those not first: " + ", ".join(f"{name} {d}" for name, d in r.percentiles.items())


def _popularity(w: Workload) -> Iterator[str]:
    yield f"popularity: a layer's {w.num_experts} experts; used alike, each serves {w.num_active / w.num_experts:.1%}"
    yield from _table(
        ["layer", "most used", "of tokens", "top quarter of uses", "effective", "unused"],
        [
            [
                str(layer.layer),
                str(layer.top_expert),
                f"{layer.popularity[layer.top_expert]:.1%}",
                f"{layer.top_quarter:.1%}",
                f"{layer.effective:.1f}",
                str(layer.unused),
            ]
            for layer in w.layers
        ],
    )


def _working_sets(w: Workload) -> Iterator[str]:
    yield f"working set of a request after so many tokens, mean, of {w.num_keys} experts"
    yield from _table(
        ["domain", "requests", "tokens", *(str(n) for n in w.set_lengths), "whole", "share"],
        [
            [
                "all" if row.domain is None else _plain(row.domain),
                str(row.num_requests),
                f"{row.mean_tokens:.0f}",
                *("-" if size is None else f"{size:.0f}" for size in row.first),
                f"{row.whole:.0f}",
                f"{row.whole / w.num_keys:.1%}",
            ]
            for row in (w.working_sets if len(w.working_sets) > 2 else w.working_sets[:1])
        ],
    )


def _overlap(w: Workload) -> Iterator[str]:
    o = w.overlap
    rows = [("of one domain", o.within, o.within_by_chance), ("of two domains", o.between, o.between_by_chance)]
    cells = [
        [name, *(_share(of[measure]) for measure in ("jaccard", "weighted") for of in (seen, chance))]
        for name, seen, chance in rows
        if seen["jaccard"] is not None
    ]
    if not cells:
        return
    yield f"overlap of two requests, {o.num_compared} compared"
    yield from _table(["", "jaccard", "by chance", "weighted", "by chance"], cells)
    if 1 < len(o.domains) <= _MOST_DOMAINS:
        yield "  weighted, by domain"
        numbers = [str(i + 1) for i in range(len(o.domains))]
        yield from _table(
            ["", *numbers],
            [
                [f"{n} {_plain(name)}", *map(_share, row)]
                for n, name, row in zip(numbers, o.domains, o.weighted, strict=True)
            ],
        )


def _batches(w: Workload) -> Iterator[str]:
    yield f"unique experts of a layer in a batch, of {w.num_experts}"
    yield from _table(
        ["tokens", *(str(batch.num_tokens) for batch in w.batches)],
        [
            ["of as many requests", *(_number(batch.of_requests) for batch in w.batches)],
            ["of one request in a row", *(_number(batch.in_a_row) for batch in w.batches)],
            ["uniform, E(1-(1-k/E)^B)", *(_number(batch.uniform) for batch in w.batches)],
        ],
    )


def _curve(of: Analysis) -> Iterator[str]:
    w = of.workload
    yield f"hit rate, {replayed(w)}"
    names = list(w.curve[0].hit_rate)
    sized = of.expert_nbytes is not None
    yield from _table(
        ["cache", "experts", "of active", *(["size"] if sized else []), *names],
        [
            [
                f"{100 * size.share:.3g}%",
                str(size.num_slots),
                f"{size.of_active:.3g}x",
                *([format_nbytes(size.num_slots * (of.expert_nbytes or 0))] if sized else []),
                *(f"{size.hit_rate[name]:.1%}" for name in names),
            ]
            for size in w.curve
        ],
    )
    if w.judgement.working_slots is not None:
        yield f"  LRU hits nothing at the sizes below {w.judgement.working_slots} experts"


def replayed(w: Workload) -> str:
    """What the hit rates are of."""
    at_once = "one request at a time" if w.concurrency == 1 else f"{w.concurrency} requests at once"
    if w.replayed_tokens == w.num_tokens:
        return f"all {w.num_tokens} tokens replayed, {at_once}, from an empty cache"
    return (
        f"a sample of {w.replayed_tokens} tokens replayed, {'' if w.replayed_whole else 'the beginnings '}of "
        f"{w.replayed_requests} request{'s' * (w.replayed_requests != 1)} spread over the trace, {at_once}, from an "
        f"empty cache"
    )


def _share(x: float | None) -> str:
    return "-" if x is None else f"{x:.1%}"


def _number(x: float | None) -> str:
    return "-" if x is None else f"{x:.1f}"


def _plain(name: str) -> str:
    """Fit for a terminal: names come from files of others."""
    shown = "".join(c if c.isprintable() else "?" for c in name)
    return shown if len(shown) <= 32 else f"{shown[:31]}…"


def _table(head: list[str], rows: Iterable[list[str]]) -> Iterator[str]:
    """The first column to the left, the others to the right."""
    lines = [head, *rows]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    for line in lines:
        cells = [
            line[0].ljust(widths[0]),
            *(cell.rjust(width) for cell, width in zip(line[1:], widths[1:], strict=True)),
        ]
        yield "  " + "  ".join(cells).rstrip()
