"""Engines that a child process is told to make: whole ones, in which some requests do what their names say."""

from __future__ import annotations

import logging
import os
import sys
import time

from cache.packed_file import PackedFileError
from engine.config import EngineConfig
from engine.convert import Progress
from engine.engine import Engine
from engine.errors import ConfigError
from engine.messages import RequestOutput
from engine.tokenizer import TokenDecoder


class OddEngine(Engine):
    def step(self) -> list[RequestOutput]:
        names = {request.request_id for request in self.scheduler.requests}
        if "log" in names:
            logging.getLogger("odd").debug("zero")
            logging.getLogger("odd").info("one")
            logging.getLogger("odd").warning("%s", "two")
        if "print" in names:
            sys.stderr.write("last words\n")
            sys.stderr.flush()
        if "die" in names:
            raise RuntimeError("boom")
        if "hang" in names:
            time.sleep(60)
        return super().step()


def build(config: EngineConfig, progress: Progress | None = None, *, tokenizer: TokenDecoder | None = None) -> Engine:
    return OddEngine(config, progress, tokenizer=tokenizer)


def refuse(kind: str, config: EngineConfig, progress: Progress | None = None, **_: object) -> Engine:
    kinds = {"ConfigError": ConfigError, "PackedFileError": PackedFileError, "KeyError": KeyError}
    raise kinds[kind]("lower it")


def exit_at_once(config: EngineConfig, progress: Progress | None = None, **_: object) -> Engine:
    os._exit(3)


def load_for_ever(config: EngineConfig, progress: Progress | None = None, **_: object) -> Engine:
    time.sleep(60)
    raise AssertionError("nobody waits that long")
