"""Machines that one does not have: published figures, and the costs that follow from them. Every figure says whence."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Literal, TypeVar

import msgspec

from engine.calibration import Calibration, ExpertCost, LinkCost, OffloadCost, PhaseCost, StepCost
from engine.errors import ConfigError

_TABLE_PATH = Path(__file__).parent / "data" / "hardware.json"
_BITS = {"float32": 32.0, "bf16": 16.0, "int8": 8.5, "int4": 4.5}  # of a weight at rest, its share of the scale too
_ALIGNMENT = 4096  # of records
_KERNELS_A_LAYER = 8  # norms, projections, attention, router
_READS_AT_ONCE = 8
_BF16_NBYTES = 2

_T = TypeVar("_T")


class Figure(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A number in SI units; `kind` is whether its source states it, it follows from what that states, or neither."""

    value: float
    source: str
    kind: Literal["published", "derived", "assumed"]


class Machine(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A GPU, and by name in the other tables what is around it."""

    description: str
    memory_nbytes: Figure
    memory_bandwidth: Figure
    bf16_flops: Figure
    int8_ops: Figure
    link: str
    host: str
    disk: str


class Channel(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A link, a host's memory or a disk."""

    bandwidth: Figure
    latency_s: Figure | None = None


class ModelShape(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Sizes of a model; `shared_size` of an expert that is always on, `dense_size` of layers without experts."""

    source: str
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_moe_layers: int
    num_experts: int
    num_active: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    vocab_size: int
    shared_size: int = 0
    dense_size: int = 0


class Hardware(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The file of figures."""

    machines: dict[str, Machine]
    links: dict[str, Channel]
    hosts: dict[str, Channel]
    disks: dict[str, Channel]
    shares: dict[str, Figure]  # of a peak that is reached
    times: dict[str, Figure]
    models: dict[str, ModelShape]


@cache
def hardware() -> Hardware:
    """What comes with Foregate."""
    return msgspec.json.decode(_TABLE_PATH.read_bytes(), type=Hardware)


def calibration_of(machine_name: str, model_name: str, experts_format: str = "int4") -> Calibration:
    """The costs of a model on a machine, none of them measured. Experts are read from host memory as far as it goes.

    Products are in bf16, dense weights too. What the engine's Python takes is not overlapped with the GPU, as on a
    GPU that waits for each layer's routing. Raises `ConfigError` for a name that is not known.
    """
    table = hardware()
    machine = _named(table.machines, machine_name, "machine")
    model = _named(table.models, model_name, "model shape")
    bits = _named(_BITS, experts_format, "expert format")
    shares = {name: figure.value for name, figure in table.shares.items()}
    times = {name: figure.value for name, figure in table.times.items()}
    weights = 3 * model.hidden_size * model.intermediate_size  # of an expert
    record_nbytes = -(-int(weights * bits / 8) // _ALIGNMENT) * _ALIGNMENT
    byte_s = 1.0 / (machine.memory_bandwidth.value * shares["memory"])
    flop_s = 1.0 / (machine.bf16_flops.value * shares["compute"])
    kernel_s = times["kernel_s"]

    def reading(num_weights: float) -> StepCost:
        """Of dense weights once for all rows."""
        return StepCost(fixed_s=num_weights * _BF16_NBYTES * byte_s, row_s=2.0 * num_weights * flop_s)

    q_size, kv_size = model.num_heads * model.head_dim, model.num_kv_heads * model.head_dim
    attention = model.hidden_size * (2 * q_size + 2 * kv_size)
    shared = 3 * model.hidden_size * model.shared_size
    layer = reading(attention + shared + model.hidden_size * model.num_experts)
    layer = msgspec.structs.replace(
        layer,
        fixed_s=layer.fixed_s + _KERNELS_A_LAYER * kernel_s,
        attended_s=2 * kv_size * _BF16_NBYTES * byte_s,
    )
    dense = reading((attention + 3 * model.hidden_size * model.dense_size) * (model.num_layers - model.num_moe_layers))
    first = StepCost(
        fixed_s=layer.fixed_s + dense.fixed_s, row_s=layer.row_s + dense.row_s, attended_s=layer.attended_s
    )
    phase = PhaseCost(
        begin=StepCost(fixed_s=times["step_s"] / 2, row_s=0.0),
        first=first,
        layer=layer,
        end=_plus(reading(model.hidden_size * model.vocab_size), times["step_s"] / 2),
        experts=ExpertCost(call_s=2 * kernel_s, expert_s=record_nbytes * byte_s, product_s=2.0 * weights * flop_s),
        combine_product_s=2 * model.hidden_size * 4 * byte_s,
    )
    # only the last token of a prompt has logits: its head is read once
    prefill = msgspec.structs.replace(phase, end=msgspec.structs.replace(phase.end, row_s=0.0))
    everywhere = model.num_layers * attention + model.num_moe_layers * shared + 2 * model.hidden_size * model.vocab_size
    dense_nbytes = everywhere * _BF16_NBYTES
    link = _named(table.links, machine.link, "link").bandwidth.value * shares["link"]
    disk = _named(table.disks, machine.disk, "disk")
    disk_rate = disk.bandwidth.value * shares["disk"]
    host_rate = _named(table.hosts, machine.host, "host").bandwidth.value
    return Calibration(
        machine=machine_name,
        model=model_name,
        experts_format=experts_format,
        is_measured=False,
        num_layers=model.num_moe_layers,
        num_experts=model.num_experts,
        record_nbytes=record_nbytes,
        decode=phase,
        prefill=prefill,
        disk=LinkCost(latency_s=disk.latency_s.value if disk.latency_s else 0.0, rates={1: disk_rate}),
        offload=OffloadCost(call_s=times["call_s"]),
        max_depth=_READS_AT_ONCE,
        link_bandwidth=min(link, host_rate),  # copies from pinned memory go at the slower of the two
        crossing_s=times["copy_s"],
        memory_nbytes=max(0, int(machine.memory_nbytes.value * shares["room"] - dense_nbytes)),
    )


def _plus(cost: StepCost, seconds: float) -> StepCost:
    return msgspec.structs.replace(cost, fixed_s=cost.fixed_s + seconds)


def _named(table: dict[str, _T], name: str, what: str) -> _T:
    if name not in table:
        raise ConfigError(f"unknown {what} {name!r}; known: {', '.join(table)}")
    return table[name]
