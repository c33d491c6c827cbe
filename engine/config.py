"""The engine's settings: frozen, composed, resolved once against the model. Knows no tensors."""

from __future__ import annotations

import re
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

from engine.errors import ConfigError

Dtype = Literal["auto", "float32", "bfloat16", "int8", "int4"]
DTYPES = ("auto", "float32", "bfloat16", "int8", "int4")

_SIZE = re.compile(r"^\s*(\d+(?:\.\d+)?)\s*([KMGT]i?B|B)?\s*$", re.IGNORECASE)
_UNITS = {"B": 1, "K": 1024, "M": 1024**2, "G": 1024**3, "T": 1024**4}


def parse_nbytes(text: str) -> int:
    """'512MiB' -> 536870912. Units KiB, MiB, GiB, TiB (KB, MB, ... mean the same); raises `ConfigError`."""
    match = _SIZE.match(text)
    if match is None:
        raise ConfigError(f"cannot read size {text!r}; write it like 512MiB or 2GiB")
    number, unit = match.groups()
    return int(float(number) * _UNITS[(unit or "B")[0].upper()])


def format_nbytes(nbytes: int) -> str:
    """536870912 -> '512.0MiB'."""
    size = float(nbytes)
    for unit in ("B", "KiB", "MiB", "GiB"):
        if size < 1024:
            return f"{size:.0f}{unit}" if unit == "B" else f"{size:.1f}{unit}"
        size /= 1024
    return f"{size:.1f}TiB"


@dataclass(frozen=True, slots=True, kw_only=True)
class CacheConfig:
    """Experts: their format, the budget of the top tier and how it is kept."""

    format: str = "auto"  # a name in kernels.quant.FORMATS; auto: see EngineConfig.resolved
    memory_nbytes: int | None = None  # None: all experts if they fit in free memory, else what fits
    policy: str = "segment"
    num_io_threads: int = 8  # at most; as many reads at once as the device was measured to need
    predictor: str = "auto"  # what is read ahead by: a name in engine.foresight.PREDICTORS
    host_memory_nbytes: int | None = None  # a tier between disk and the top one; None: there is none
    exclusive_tiers: bool = False  # what is in the top tier is not in the host tier too
    cpu_experts: bool = False  # on a device: what is missing there may be computed on the CPU, by its own rounding
    link_bandwidth: float | None = None  # bytes/s: the tier below behaves like a link of that speed
    packed_dir: Path | None = None  # where packed experts are kept; None: beside the checkpoint


@dataclass(frozen=True, slots=True, kw_only=True)
class SchedulerConfig:
    """Limits of one step and of the queue, and how the requests of a step are chosen."""

    policy: str = "expert-aware"  # a name in engine.schedulers.SCHEDULERS
    max_num_seqs: int = 32  # requests that run
    max_step_seqs: int | None = None  # of these in one step; None: all
    max_num_batched_tokens: int = 512
    max_streamed_tokens: int = 2048  # instead, where the experts of a prompt have to be streamed anyway
    max_num_waiting: int | None = None  # None: 4 x max_num_seqs
    max_queued_tokens: int = 1024**2  # of prompts that have not been answered at all yet
    target_itl_s: float | None = None  # between two tokens of an answer
    target_ttft_s: float | None = None  # to the first
    quantum: int = 1  # steps for which a group that was chosen by experts stays
    max_passed_over: int = 32  # turns in which a request may be left out of the group

    @property
    def step_seqs(self) -> int:
        return self.max_num_seqs if self.max_step_seqs is None else min(self.max_step_seqs, self.max_num_seqs)

    def check(self) -> None:
        """Raises `ConfigError` for a bound that cannot be kept."""
        for name, target in (("target_itl", self.target_itl_s), ("target_ttft", self.target_ttft_s)):
            if target is not None and not target > 0:
                raise ConfigError(f"{name} must be a time above 0, got {target}")
        kept = max(1, self.step_seqs - 1)  # one place may be taken by who begins
        if self.step_seqs < self.max_num_seqs and (self.max_passed_over + 1) * kept < self.max_num_seqs:
            raise ConfigError(
                f"steps of {self.step_seqs} requests cannot serve {self.max_num_seqs} within {self.max_passed_over} "
                f"turns: raise max_step_seqs or max_passed_over, or lower max_num_seqs"
            )

    @property
    def waiting_limit(self) -> int:
        return 4 * self.max_num_seqs if self.max_num_waiting is None else self.max_num_waiting


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineConfig:
    """All of it. `model` is a local checkpoint directory (see engine.hub.resolve_model for names)."""

    model: Path
    served_name: str | None = None  # None: the directory's name
    # Dense weights; products round activations alike, keys and values are at most bf16 but for float32. int4: those of
    # attention, the others are int8.
    dtype: Dtype = "auto"
    max_model_len: int | None = None  # None: what the model allows and KV memory holds
    kv_memory_nbytes: int = 512 * 1024**2
    share_memory: bool = False  # on a device, keys and values get what serves the most tokens instead
    num_threads: int | None = None  # None: one for each core that this process may use
    record_trace: Path | None = None  # which experts tokens were routed to, written when the engine ends
    device: str = "cpu"  # where experts are computed: cpu, or a name in cache.device.DEVICES
    expert_parallel: int = 1  # processes that share the experts
    placement: Path | None = None  # which of them has which, from `foregate trace placement`; None: in turn
    kernels: str = "auto"  # a name in kernels.backend.BACKENDS; auto: native where it was built
    router: str = "auto"  # a name in engine.models.spec.ROUTERS; auto: the layers' own
    seed: int | None = None  # of requests that bring none; None: from the operating system
    cache: CacheConfig = field(default_factory=CacheConfig)
    scheduler: SchedulerConfig = field(default_factory=SchedulerConfig)

    def __post_init__(self) -> None:
        if self.dtype not in DTYPES:
            raise ConfigError(f"unknown dtype {self.dtype!r}; known: {', '.join(DTYPES)}")
        for name, value in (
            ("max_model_len", self.max_model_len),
            ("max_num_seqs", self.scheduler.max_num_seqs),
            ("max_num_batched_tokens", self.scheduler.max_num_batched_tokens),
            ("kv_memory", self.kv_memory_nbytes),
            ("expert_memory", self.cache.memory_nbytes),
            ("max_step_seqs", self.scheduler.max_step_seqs),
            ("max_streamed_tokens", self.scheduler.max_streamed_tokens),
            ("max_queued_tokens", self.scheduler.max_queued_tokens),
            ("quantum", self.scheduler.quantum),
            ("num_io_threads", self.cache.num_io_threads),
            ("num_threads", self.num_threads),
            ("expert_parallel", self.expert_parallel),
        ):
            if value is not None and value < 1:
                raise ConfigError(f"{name} must be at least 1, got {value}")
        if self.scheduler.max_num_batched_tokens < self.scheduler.max_num_seqs:
            raise ConfigError(
                f"max_num_batched_tokens {self.scheduler.max_num_batched_tokens} must be at least max_num_seqs "
                f"{self.scheduler.max_num_seqs}, so that every running request gets a token in each step"
            )

        self.scheduler.check()

    def resolved(self, has_experts: bool) -> EngineConfig:
        """With `auto` settled: experts bf16, the checkpoint's own bits; dense weights float32, on a GPU bf16."""
        exact: Dtype = "bfloat16" if self.device == "cuda" else "float32"
        dtype = exact if self.dtype == "auto" else self.dtype
        format = "bf16" if self.cache.format == "auto" and has_experts else self.cache.format
        return replace(self, dtype=dtype, cache=replace(self.cache, format=format))
