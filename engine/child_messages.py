"""What crosses only when the engine is a process of its own: how to begin, and what its terminal would show."""

from __future__ import annotations

import logging

import msgspec

from cache.packed_file import PackedFileError
from engine.build import Build
from engine.config import EngineConfig
from engine.errors import CheckpointError, ConfigError
from engine.messages import FromEngine, ModelInfo, ToEngine
from engine.stored_tokenizer import TokenizerState


class Load(msgspec.Struct, frozen=True, tag=True):
    """To the child, first of all: which engine to make, and from which level on to log."""

    config: EngineConfig
    build: Build
    log_level: int
    tokenizer: TokenizerState | None  # None: the engine loads its own


class Loading(msgspec.Struct, frozen=True, tag=True):
    """From the child: how far it is."""

    what: str
    done: int
    total: int


class Loaded(msgspec.Struct, frozen=True, tag=True):
    """From the child: it serves from now on, with these settings."""

    info: ModelInfo
    config: EngineConfig


class LoadFailed(msgspec.Struct, frozen=True, tag=True):
    """From the child: it ends without having served. `kind` is the name of the exception."""

    kind: str
    text: str

    def exception(self) -> Exception:
        """Of the kind that callers know, or a `RuntimeError` that names it."""
        known = {kind.__name__: kind for kind in (ConfigError, CheckpointError, PackedFileError)}
        if self.kind in known:
            return known[self.kind](self.text)
        return RuntimeError(f"{self.kind}: {self.text}")


class Logged(msgspec.Struct, frozen=True, tag=True):
    """From the child: a line of its log, which is to be its parent's."""

    name: str
    level: int
    created: float
    text: str

    def log(self) -> None:
        logger = logging.getLogger(self.name)
        if logger.isEnabledFor(self.level):
            record = logger.makeRecord(self.name, self.level, "", 0, self.text, (), None)
            record.created = self.created
            record.msecs = self.created % 1 * 1000
            logger.handle(record)


ToChild = ToEngine | Load
FromChild = FromEngine | Loading | Loaded | LoadFailed | Logged
