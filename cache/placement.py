"""Which of several ranks has which experts, so that their loads are even. From recorded routing; knows no processes."""

from __future__ import annotations

from pathlib import Path

import msgspec
import numpy as np
from numpy.typing import NDArray

from cache.trace import RoutingTrace

_Loads = NDArray[np.float64]
_NUM_WINDOWS = 24  # of a trace that are balanced, each so many tokens
_GAP = 0.01  # from the best that an assignment may be


class Placement(msgspec.Struct, frozen=True, kw_only=True):
    """Rank `ranks[l][e]` has expert e of the l-th layer with experts."""

    num_ranks: int
    ranks: tuple[tuple[int, ...], ...]

    def check(self, num_layers: int, num_experts: int) -> None:
        """Raise `ValueError` if it is of another model or names a rank that is not there."""
        if len(self.ranks) != num_layers or any(len(layer) != num_experts for layer in self.ranks):
            raise ValueError(f"the placement is not of {num_layers} layers of {num_experts} experts")
        if any(not 0 <= rank < self.num_ranks for layer in self.ranks for rank in layer):
            raise ValueError(f"the placement names a rank beyond its {self.num_ranks}")

    def save(self, path: Path) -> None:
        path.write_bytes(msgspec.json.encode(self) + b"\n")


def load_placement(path: Path) -> Placement:
    """Raises `ValueError` naming the file."""
    try:
        return msgspec.json.decode(path.read_bytes(), type=Placement)
    except (OSError, msgspec.DecodeError) as error:
        raise ValueError(f"{path.name} is no placement: {error}") from error


def in_turn(num_layers: int, num_experts: int, num_ranks: int) -> Placement:
    """Expert e is on rank e * N / E: what there is to do without a trace."""
    layer = tuple(expert * num_ranks // num_experts for expert in range(num_experts))
    return Placement(num_ranks=num_ranks, ranks=(layer,) * num_layers)


def balanced(trace: RoutingTrace, num_ranks: int, *, window: int = 32, time_limit_s: float = 2.0) -> Placement:
    """The most loaded rank has, in the mean over windows of the trace, as little to do as can be found.

    One mixed-integer program a layer (scipy's milp): each expert on one rank, each rank as many experts as the others.
    What was found within `time_limit_s` is taken. Raises `ValueError` for more ranks than experts.
    """
    if not 0 < num_ranks <= trace.num_experts:
        raise ValueError(f"{trace.num_experts} experts cannot be spread over {num_ranks} ranks")
    loads = window_loads(trace, window)
    picked = loads[np.linspace(0, len(loads) - 1, min(len(loads), _NUM_WINDOWS)).astype(np.int64)]
    ranks = tuple(_layer(picked[:, layer], num_ranks, time_limit_s) for layer in range(loads.shape[1]))
    return Placement(num_ranks=num_ranks, ranks=ranks)


def imbalance(trace: RoutingTrace, placement: Placement, *, window: int = 32) -> float:
    """Load of the most loaded rank over the ranks' mean: of `window` tokens, in the mean over windows and layers."""
    placement.check(len(trace.layers), trace.num_experts)
    loads = window_loads(trace, window)
    ratios = []
    for layer, ranks in enumerate(placement.ranks):
        of_rank = np.zeros((len(loads), placement.num_ranks))
        np.add.at(of_rank.T, np.asarray(ranks), loads[:, layer].T)
        ratios.append(of_rank.max(axis=1) / of_rank.mean(axis=1))
    return float(np.mean(ratios))


def window_loads(trace: RoutingTrace, window: int) -> _Loads:
    """[windows, L, E]: products of each expert in each `window` tokens; what is left at the end is left out."""
    num = max(1, trace.num_tokens // window)
    loads = np.zeros((num, len(trace.layers), trace.num_experts))
    for i in range(num):
        ids = trace.ids[i * window : (i + 1) * window]
        for layer in range(len(trace.layers)):
            loads[i, layer] = np.bincount(ids[:, layer].ravel(), minlength=trace.num_experts)
    return loads


def _layer(loads: _Loads, num_ranks: int, time_limit_s: float) -> tuple[int, ...]:
    """Loads [W, E] of one layer -> the rank of each expert. Variables are x[e, n], whether e is on n, then W maxima."""
    from scipy.optimize import Bounds, LinearConstraint, milp
    from scipy.sparse import hstack, identity, kron, vstack

    num_windows, num_experts = loads.shape
    num_places = num_experts * num_ranks
    on_one = hstack([kron(identity(num_experts), np.ones((1, num_ranks))), np.zeros((num_experts, num_windows))])
    as_many = hstack([kron(np.ones((1, num_experts)), identity(num_ranks)), np.zeros((num_ranks, num_windows))])
    below = vstack(
        [
            hstack([kron(loads[w : w + 1], identity(num_ranks)), -np.eye(num_windows)[w] * np.ones((num_ranks, 1))])
            for w in range(num_windows)
        ]
    )
    few, many = num_experts // num_ranks, -(-num_experts // num_ranks)
    found = milp(
        np.concatenate([np.zeros(num_places), np.ones(num_windows)]),
        constraints=[
            LinearConstraint(on_one.tocsr(), 1, 1),
            LinearConstraint(as_many.tocsr(), few, many),
            LinearConstraint(below.tocsr(), -np.inf, 0),
        ],
        integrality=np.concatenate([np.ones(num_places), np.zeros(num_windows)]),
        bounds=Bounds(0, np.concatenate([np.ones(num_places), np.full(num_windows, np.inf)])),
        options={"time_limit": time_limit_s, "mip_rel_gap": _GAP},
    )
    greedy = _greedy(loads, num_ranks)
    if found.x is None:
        return greedy
    solved = tuple(np.asarray(found.x[:num_places]).reshape(num_experts, num_ranks).argmax(axis=1).tolist())
    return min((solved, greedy), key=lambda ranks: _worst(loads, ranks, num_ranks))


def _greedy(loads: _Loads, num_ranks: int) -> tuple[int, ...]:
    """The heaviest expert first, each to the rank where the windows' maxima grow least."""
    num_windows, num_experts = loads.shape
    of_rank = np.zeros((num_ranks, num_windows))
    room = np.full(num_ranks, num_experts // num_ranks)
    room[: num_experts % num_ranks] += 1
    ranks = [0] * num_experts
    for expert in np.argsort(-loads.sum(axis=0), kind="stable").tolist():
        after = of_rank + loads[:, expert]
        others = of_rank.max(axis=0)
        cost = np.maximum(after, others).sum(axis=1) + 1e-6 * after.sum(axis=1)
        cost[room == 0] = np.inf
        rank = int(cost.argmin())
        ranks[expert] = rank
        of_rank[rank] = after[rank]
        room[rank] -= 1
    return tuple(ranks)


def _worst(loads: _Loads, ranks: tuple[int, ...], num_ranks: int) -> float:
    of_rank = np.zeros((num_ranks, len(loads)))
    np.add.at(of_rank, np.asarray(ranks), loads.T)
    return float(of_rank.max(axis=0).sum())
