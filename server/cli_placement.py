"""`foregate trace placement`: which of several processes should have which experts."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from server.cli_trace import read_trace


def placement(
    trace: Annotated[Path, typer.Argument(help="A trace, or a folder of traces of one model, which are joined.")],
    ranks: Annotated[int, typer.Option(min=2, help="Processes: what --expert-parallel will say.")] = 2,
    out: Annotated[Path | None, typer.Option(help="Write it here, for `foregate serve --placement`.")] = None,
    window: Annotated[int, typer.Option(min=1, help="Tokens of a step whose load is to be even.")] = 32,
    seconds: Annotated[float, typer.Option(min=0.01, help="To look for a better one, for each layer.")] = 2.0,
) -> None:
    """Spread a model's experts so that no process has much more to do than the others, as a trace has it.

    Learned from the first half of the requests; what it does for the second, which it has not seen, is said beside.
    """
    from cache.placement import balanced, imbalance, in_turn

    first, second = read_trace(trace, half="first"), read_trace(trace, half="second")
    before = in_turn(len(first.layers), first.num_experts, ranks)
    found = balanced(first, ranks, window=window, time_limit_s=seconds)
    typer.echo(f"load of the busiest of {ranks} processes over the mean, steps of {window} tokens:")
    for name, part in (("the half it was learned from", first), ("the other half", second)):
        typer.echo(
            f"  {name}, {part.num_tokens} tokens: {imbalance(part, before, window=window):.3f} in turn, "
            f"{imbalance(part, found, window=window):.3f} placed"
        )
    if out is not None:
        found.save(out)
        typer.echo(out)
