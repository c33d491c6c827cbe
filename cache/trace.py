"""Recorded routing: which experts each token of each request was routed to. Knows files, no policy and no model."""

from __future__ import annotations

import json
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

FORMAT_VERSION = 1
_PUBLISHED = {  # files of other projects say neither; name prefix -> number of experts
    "gpt-oss-20b": 32,
    "deepseek-v2-lite": 64,
    "granite-3.0-1b-a400m": 32,
    "qwen1.5-moe-a2.7b": 60,
}


@dataclass(frozen=True, slots=True, eq=False)
class RoutingTrace:
    """Request r is rows seq_off[r]:seq_off[r + 1], tokens in order, the first num_prompt[r] of them its prompt.

    Raises `ValueError` if the parts contradict each other.
    """

    ids: NDArray[np.uint8] | NDArray[np.uint16]  # [T, L, k] experts
    seq_off: NDArray[np.int64]  # [R + 1]
    num_prompt: NDArray[np.int64]  # [R] tokens that came in a prefill; 0 where all are to be replayed one by one
    num_experts: int
    layers: tuple[int, ...]  # ids, ascending
    domains: tuple[str, ...]  # of each request
    token_ids: NDArray[np.int64] | None = None  # [T]

    def __post_init__(self) -> None:
        ids, off = self.ids, self.seq_off
        if ids.ndim != 3 or ids.dtype not in (np.uint8, np.uint16) or 0 in ids.shape[1:]:
            raise ValueError(f"ids are {ids.dtype} {list(ids.shape)}, not uint8 or uint16 [tokens, layers, k]")
        if off.ndim != 1 or len(off) < 1 or off[0] != 0 or off[-1] != len(ids) or (np.diff(off) < 0).any():
            raise ValueError("the sequence offsets do not ascend from 0 to the number of tokens")
        if len(self.layers) != ids.shape[1] or list(self.layers) != sorted(set(self.layers)):
            raise ValueError(f"{ids.shape[1]} layers, but {len(self.layers)} layer ids or not ascending ones")
        if ids.size and int(ids.max()) >= self.num_experts:
            raise ValueError(f"expert {int(ids.max())} of {self.num_experts}")
        lengths = np.diff(off)
        if self.num_prompt.shape != lengths.shape or ((self.num_prompt < 0) | (self.num_prompt > lengths)).any():
            raise ValueError("the prompts' lengths do not fit the requests")
        if len(self.domains) != self.num_requests:
            raise ValueError(f"{len(self.domains)} domains of {self.num_requests} requests")
        if self.token_ids is not None and self.token_ids.shape != ids.shape[:1]:
            raise ValueError("not one token id a token")

    @property
    def num_requests(self) -> int:
        return len(self.seq_off) - 1

    @property
    def num_tokens(self) -> int:
        return len(self.ids)

    @property
    def num_keys(self) -> int:
        """Experts of all layers."""
        return len(self.layers) * self.num_experts

    def select(self, start: int, stop: int) -> RoutingTrace:
        """The requests start:stop, as a slice would take them."""
        start, stop, _ = slice(start, stop).indices(self.num_requests)
        stop = max(start, stop)
        first, last = int(self.seq_off[start]), int(self.seq_off[stop])
        return RoutingTrace(
            ids=self.ids[first:last],
            seq_off=self.seq_off[start : stop + 1] - first,
            num_prompt=self.num_prompt[start:stop],
            num_experts=self.num_experts,
            layers=self.layers,
            domains=self.domains[start:stop],
            token_ids=None if self.token_ids is None else self.token_ids[first:last],
        )

    def save(self, path: Path) -> None:
        """Write a compressed .npz."""
        arrays: dict[str, Any] = {
            "format_version": np.int64(FORMAT_VERSION),
            "ids": self.ids,
            "seq_off": self.seq_off,
            "num_prompt": self.num_prompt,
            "num_experts": np.int64(self.num_experts),
            "layer_index": np.asarray(self.layers, dtype=np.int64),
            "domains": np.asarray(self.domains, dtype=np.str_),
        }
        if self.token_ids is not None:
            arrays["token_id"] = self.token_ids
        with path.open("wb") as file:
            np.savez_compressed(file, **arrays)


def load(path: Path) -> RoutingTrace:
    """Read a trace: what `save` wrote, a published .npz or the granite .json. Raises `ValueError` naming the file."""
    try:
        if path.suffix == ".json":
            return _of_json(json.loads(path.read_text(encoding="utf-8")))
        with path.open("rb") as file, np.load(file, allow_pickle=False) as arrays:
            parts = {name: arrays[name] for name in arrays.files}
        return _of_ours(parts) if "format_version" in parts else _of_published(parts, path.name)
    except (ValueError, KeyError, TypeError, IndexError, EOFError, AttributeError, zipfile.BadZipFile) as error:
        why = f"has no {error}" if isinstance(error, KeyError) else str(error)
        raise ValueError(f"routing trace {path.name} cannot be used: {why}") from error


def load_all(path: Path) -> list[RoutingTrace]:
    """The trace of a file, or those of all files in a folder by name."""
    if not path.is_dir():
        return [load(path)]
    files = sorted(file for file in path.iterdir() if file.suffix in (".npz", ".json"))
    if not files:
        raise ValueError(f"no routing traces (.npz, .json) in {path}")
    return [load(file) for file in files]


def concatenate(traces: Sequence[RoutingTrace]) -> RoutingTrace:
    """One workload of several traces of one model, in order. Token ids stay if all have them."""
    first = traces[0]
    if len({(trace.layers, trace.num_experts, trace.ids.shape[2]) for trace in traces}) > 1:
        raise ValueError("traces of different models cannot be joined")
    lengths = np.concatenate([np.diff(trace.seq_off) for trace in traces])
    tokens = [trace.token_ids for trace in traces if trace.token_ids is not None]
    return RoutingTrace(
        ids=np.concatenate([trace.ids for trace in traces]),
        seq_off=np.concatenate(([0], np.cumsum(lengths))).astype(np.int64),
        num_prompt=np.concatenate([trace.num_prompt for trace in traces]),
        num_experts=first.num_experts,
        layers=first.layers,
        domains=tuple(domain for trace in traces for domain in trace.domains),
        token_ids=np.concatenate(tokens) if len(tokens) == len(traces) else None,
    )


def in_turns(trace: RoutingTrace) -> RoutingTrace:
    """The same requests with the domains taking turns, each in its own order: a mixed workload."""
    of_domain: dict[str, list[int]] = {}
    for request, domain in enumerate(trace.domains):
        of_domain.setdefault(domain, []).append(request)
    rounds = zip_longest(*of_domain.values())
    return concatenate([trace.select(r, r + 1) for turn in rounds for r in turn if r is not None])


def _of_ours(parts: dict[str, Any]) -> RoutingTrace:
    version = int(parts["format_version"])
    if version != FORMAT_VERSION:
        raise ValueError(f"it is of version {version}, this Foregate reads version {FORMAT_VERSION}")
    return RoutingTrace(
        ids=parts["ids"],
        seq_off=parts["seq_off"].astype(np.int64),
        num_prompt=parts["num_prompt"].astype(np.int64),
        num_experts=int(parts["num_experts"]),
        layers=tuple(int(layer) for layer in parts["layer_index"]),
        domains=tuple(str(domain) for domain in parts["domains"]),
        token_ids=parts["token_id"].astype(np.int64) if "token_id" in parts else None,
    )


def _of_published(parts: dict[str, Any], name: str) -> RoutingTrace:
    model = next((prefix for prefix in _PUBLISHED if name.startswith(prefix)), None)
    if model is None:
        raise ValueError(f"it does not say its number of experts, and is none of {', '.join(_PUBLISHED)}")
    ids, seq_off = parts["ids"], parts["seq_off"].astype(np.int64)
    num_requests = len(seq_off) - 1
    num_prompt = np.zeros(num_requests, dtype=np.int64)
    if "is_decode" in parts:
        sums = np.concatenate(([0], np.cumsum(parts["is_decode"] == 0)))
        num_prompt = sums[seq_off[1:]] - sums[seq_off[:-1]]
    tokens = parts.get("token_id", parts.get("tok_crc32"))  # the latter says which are alike, not what they are
    domain = name.removeprefix(model).lstrip(".").split(".")[0]
    return RoutingTrace(
        ids=ids,
        seq_off=seq_off,
        num_prompt=num_prompt,
        num_experts=_PUBLISHED[model],
        layers=tuple(int(layer) for layer in parts.get("layer_index", np.arange(ids.shape[1]))),
        domains=(domain,) * num_requests,
        token_ids=None if tokens is None else tokens.astype(np.int64),
    )


def _of_json(parsed: dict[str, Any]) -> RoutingTrace:
    """{"num_experts": E, "prompts": {name: {"prefill": [T][L][k], "decode": [T][L][k]}}}."""
    prompts = parsed["prompts"]
    rows = [np.asarray(request["prefill"] + request["decode"], dtype=np.uint16) for request in prompts.values()]
    lengths = [len(part) for part in rows]
    ids = np.concatenate(rows)
    return RoutingTrace(
        ids=ids,
        seq_off=np.concatenate(([0], np.cumsum(lengths))).astype(np.int64),
        num_prompt=np.asarray([len(request["prefill"]) for request in prompts.values()], dtype=np.int64),
        num_experts=int(parsed["num_experts"]),
        layers=tuple(range(ids.shape[1])),
        domains=tuple(prompts),
    )
