"""What is known of every expert at one moment, packed: small enough to be sent once a second."""

from __future__ import annotations

import msgspec

RESIDENCY = ("absent", "host", "top")
"""What the numbers of `ExpertTable.residency` mean: the fastest tier that the expert is ready in."""


class ExpertTable(msgspec.Struct, frozen=True, kw_only=True):
    """Tables [layers, num_experts], row by row, little-endian. Queries and hits count from the engine's start."""

    layers: list[int]  # what the model calls them; those without experts are left out
    num_experts: int
    half_life_s: float
    queries: bytes  # uint64: times that a layer call asked for it
    hits: bytes  # uint64: of these, it was ready in the top tier
    recent: bytes  # float32: queries of late, each worth half as much after `half_life_s`
    residency: bytes  # uint8: index into `RESIDENCY`
