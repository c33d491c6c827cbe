"""A rank that does not lead: `python -m engine.expert_rank DIRECTORY RANK`, started by `engine.expert_group` alone."""

from __future__ import annotations

import logging
import os
import sys
from pathlib import Path

from engine.config import EngineConfig
from engine.engine import Engine
from engine.frames import FrameCodec
from engine.threads import wait_passively

_log = logging.getLogger(__name__)


def main(directory: Path, rank: int) -> None:
    """Compute the leader's steps until it says that there are no more, or is gone."""
    (config,) = FrameCodec[EngineConfig](EngineConfig).feed((directory / "config").read_bytes())
    engine = Engine(config, rank=rank, meeting=directory)
    try:
        engine.follow()
    except RuntimeError as error:
        _log.info("the leader is gone: %s", error)
        os._exit(0)  # what a step has under way waits for nobody
    engine.close()


if __name__ == "__main__":
    wait_passively()
    main(Path(sys.argv[1]), int(sys.argv[2]))
