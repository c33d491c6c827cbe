"""What the commands that load an engine share: their options in groups, and the configuration that these make."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass, fields, is_dataclass, replace
from functools import wraps
from pathlib import Path
from typing import Any, Protocol, get_type_hints

from engine.config import EngineConfig
from server.cli_options import (
    CachePolicy,
    Dtype,
    ExclusiveTiers,
    ExpertMemory,
    Experts,
    HostMemory,
    Kernels,
    Layers,
    LinkBandwidth,
    Model,
    OpenKvMemory,
    Predictor,
    RandomShape,
    Router,
    Threads,
    check_random,
    directory_of,
)
from server.settings import Environment


@dataclass(frozen=True)
class Weights:
    """A model's, or random ones."""

    model: Model = "demo"
    random: RandomShape = None
    layers: Layers = None

    def check(self) -> None:
        """Refuse what would not be honoured."""
        check_random(self.model, self.random, self.layers)

    def directory(self) -> Path:
        """Where the checkpoint is; of random weights nowhere."""
        return Path() if self.random else directory_of(self.model, Environment())


class Group(Protocol):
    """Options that change some of an engine's settings."""

    def applied(self, config: EngineConfig) -> EngineConfig: ...


@dataclass(frozen=True)
class Formats:
    dtype: Dtype = "auto"
    experts: Experts = "auto"

    def applied(self, config: EngineConfig) -> EngineConfig:
        return replace(
            config,
            dtype=self.dtype,  # type: ignore[arg-type]  # checked by EngineConfig
            cache=replace(config.cache, format=self.experts),
        )


@dataclass(frozen=True)
class Memory:
    kv_memory: OpenKvMemory = None
    expert_memory: ExpertMemory = None

    def applied(self, config: EngineConfig) -> EngineConfig:
        cache = replace(config.cache, memory_nbytes=self.expert_memory)
        if self.kv_memory is None:  # a device's is shared by measurement
            return replace(config, share_memory=self.expert_memory is None, cache=cache)
        return replace(config, kv_memory_nbytes=self.kv_memory, cache=cache)


@dataclass(frozen=True)
class Tiers:
    cache_policy: CachePolicy = "segment"
    predictor: Predictor = "auto"
    host_memory: HostMemory = None
    exclusive_tiers: ExclusiveTiers = False
    link_bandwidth: LinkBandwidth = None

    def applied(self, config: EngineConfig) -> EngineConfig:
        cache = replace(
            config.cache,
            policy=self.cache_policy,
            predictor=self.predictor,
            host_memory_nbytes=self.host_memory,
            exclusive_tiers=self.exclusive_tiers,
            link_bandwidth=self.link_bandwidth,
        )
        return replace(config, cache=cache)


@dataclass(frozen=True)
class Arithmetic:
    threads: Threads = None
    kernels: Kernels = "auto"
    router: Router = "auto"

    def applied(self, config: EngineConfig) -> EngineConfig:
        return replace(config, num_threads=self.threads, kernels=self.kernels, router=self.router)


def engine_config(model: Path, *groups: Group, packed_dir: Path | None = None) -> EngineConfig:
    """Raises `ConfigError` as `EngineConfig` does."""
    config = EngineConfig(model=model)
    for group in groups:
        config = group.applied(config)
    return replace(config, cache=replace(config.cache, packed_dir=packed_dir))


def grouped(command: Callable[..., None]) -> Callable[..., None]:
    """The command as typer takes it: in the place of each parameter that is a group stand the group's options."""
    hints = get_type_hints(command, include_extras=True)
    groups: dict[str, Any] = {}
    parameters = []
    for parameter in inspect.signature(command).parameters.values():
        annotation = hints[parameter.name]
        if is_dataclass(annotation):
            groups[parameter.name] = annotation
            of_group = get_type_hints(annotation, include_extras=True)
            options = [(field.name, field.default, of_group[field.name]) for field in fields(annotation)]
        else:
            options = [(parameter.name, parameter.default, annotation)]
        parameters += [
            inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=kind)
            for name, default, kind in options
        ]

    @wraps(command)
    def run(**given: Any) -> None:
        for name, group in groups.items():
            given[name] = group(**{field.name: given.pop(field.name) for field in fields(group)})
        command(**given)

    run.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    run.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    return run
