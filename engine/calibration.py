"""What serving costs on one machine, as a simulation needs it: a file of numbers, measured or derived. No torch."""

from __future__ import annotations

from pathlib import Path

import msgspec
import numpy as np

from cache.trace import RoutingTrace
from engine.errors import ConfigError

FORMAT_VERSION = 1


class StepCost(msgspec.Struct, frozen=True, kw_only=True):
    """Seconds of some work of a step besides the routed experts'."""

    fixed_s: float
    row_s: float  # for each row of the step
    attended_s: float = 0.0  # for each position that each row attends to

    def seconds(self, num_rows: int, num_attended: int) -> float:
        return self.fixed_s + self.row_s * num_rows + self.attended_s * num_attended


class ExpertCost(msgspec.Struct, frozen=True, kw_only=True):
    """Seconds of one call of the expert kernel. A product is one row through one expert."""

    call_s: float
    expert_s: float
    product_s: float

    def seconds(self, num_experts: int, num_products: int) -> float:
        return self.call_s + self.expert_s * num_experts + self.product_s * num_products


class PhaseCost(msgspec.Struct, frozen=True, kw_only=True):
    """All compute of a step, when every expert is in memory."""

    begin: StepCost  # until the tokens are embedded and what reads ahead is told of them
    first: StepCost  # from there until the first layer with experts is routed
    layer: StepCost  # from one layer's experts to the next one's
    end: StepCost  # after the last layer's experts
    experts: ExpertCost
    combine_product_s: float  # where a layer's experts were not computed in one call


class LinkCost(msgspec.Struct, frozen=True, kw_only=True):
    """The lowest tier. `rates[n]`: bytes/s of n reads at once together, once each has waited for its latency."""

    latency_s: float
    rates: dict[int, float]

    def rate(self, num_reads: int) -> float:
        """Of all of them together."""
        at = sorted(self.rates)
        return float(np.interp(num_reads, at, [self.rates[n] for n in at]))


class OffloadCost(msgspec.Struct, frozen=True, kw_only=True):
    """What experts that are not all in memory cost beside their reads, in seconds of the thread that computes."""

    call_s: float = 0.0  # bookkeeping of a layer call
    row_s: float = 0.0  # and for each of its rows
    miss_s: float = 0.0  # a miss: its victim, its ticket
    arrival_s: float = 0.0  # from a record's arrival until the thread that waited for it goes on
    prefetch_s: float = 0.0  # a read ahead
    foretell_s: float = 0.0  # a layer call that the predictors look at
    experts_slowdown: float = 1.0  # of the expert kernel, whose weights are not where they were the last time
    compute_slowdown: float = 1.0  # of all compute while records are read
    read_slowdown: float = 1.0  # of reads while something is computed


class Calibration(msgspec.Struct, frozen=True, kw_only=True):
    """One machine and one model on it. `is_measured` is false where hardware tables stand in for measurements."""

    format_version: int = FORMAT_VERSION
    machine: str
    model: str
    experts_format: str
    dtype: str | None = None  # of the other weights; None: not known
    is_measured: bool
    num_layers: int  # with experts
    num_experts: int  # of each
    record_nbytes: int
    decode: PhaseCost
    prefill: PhaseCost
    disk: LinkCost
    offload: OffloadCost
    disk_bandwidth: float | None = None  # bytes/s as `engine.link_probe.disk_bandwidth` had it then; None: not known
    max_depth: int = 8  # reads at once
    link_bandwidth: float | None = None  # bytes/s of what all records cross one by one, if there is such a link
    crossing_s: float = 0.0  # beside that, for each read
    host_bandwidth: float | None = None  # bytes/s of copies out of the host tier; None: they take no time
    host_nbytes: int | None = None  # that the host tier can have; None: not known
    memory_nbytes: int | None = None  # that experts can have in the top tier; None: not known

    def check(self, trace: RoutingTrace) -> None:
        """Raise `ConfigError` if the trace is of another model."""
        for name, mine, its in (
            ("layers with experts", self.num_layers, len(trace.layers)),
            ("experts a layer", self.num_experts, trace.num_experts),
        ):
            if mine != its:
                raise ConfigError(
                    f"the calibration is of {self.model} with {mine} {name}, the trace has {its}: "
                    "calibrate the model that the trace was recorded from"
                )

    def save(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(msgspec.json.format(msgspec.json.encode(self), indent=2) + b"\n")


def load_calibration(path: Path) -> Calibration:
    """Read what `Calibration.save` wrote. Raises `ConfigError` naming the file."""
    try:
        calibration = msgspec.json.decode(path.read_bytes(), type=Calibration)
    except FileNotFoundError:
        raise ConfigError(f"no calibration at {path}: make one by `foregate calibrate`") from None
    except msgspec.DecodeError as error:
        raise ConfigError(f"{path.name} is not a calibration: {error}") from error
    if calibration.format_version != FORMAT_VERSION:
        raise ConfigError(
            f"{path.name} is a calibration of version {calibration.format_version}, this Foregate reads version "
            f"{FORMAT_VERSION}: run `foregate calibrate` again"
        )
    return calibration
