"""What makes an engine, by name: a child process is told so, since no function crosses to it."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Literal

import msgspec

from engine.config import EngineConfig

if TYPE_CHECKING:
    from engine.convert import Progress
    from engine.engine import Engine
    from engine.tokenizer import TokenDecoder


class Build(msgspec.Struct, frozen=True):
    """Calls `target(*args, config, progress)`, an importable "module:name"; `again` instead when one has died."""

    target: str = "engine.engine:Engine"
    args: tuple[str | int | None, ...] = ()
    again: str | None = None
    tokenizer: Literal["checkpoint", "numbers"] = "checkpoint"

    def __call__(
        self, config: EngineConfig, progress: Progress | None = None, tokenizer: TokenDecoder | None = None
    ) -> Engine:
        """`tokenizer`: loaded before; the target is given it by name."""
        module, _, name = self.target.partition(":")
        known = {} if tokenizer is None else {"tokenizer": tokenizer}
        engine: Engine = getattr(import_module(module), name)(*self.args, config, progress, **known)
        return engine

    @property
    def repeated(self) -> Build:
        """For the settings of an engine that was built before."""
        return self if self.again is None else msgspec.structs.replace(self, target=self.again)


PLANNED = Build("engine.plan:planned_engine", again="engine.engine:Engine")


def random_weights(shape: str, num_layers: int | None) -> Build:
    """An engine of random weights, whose tokens are numbers."""
    return Build("engine.synthetic:random_engine", (shape, num_layers), tokenizer="numbers")
