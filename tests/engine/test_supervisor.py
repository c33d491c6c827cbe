"""engine/supervisor.py: what becomes of an engine that cannot be replaced; test_process_link.py has those that can."""

from __future__ import annotations

import pytest

from engine.errors import EngineDead
from engine.messages import ModelInfo, Stop, ToEngine
from engine.restarts import Restarts
from engine.supervisor import Supervisor
from engine.tokenizer import Tokenizer

INFO = ModelInfo(
    name="m",
    model_type="t",
    max_model_len=8,
    vocab_size=4,
    has_chat_template=False,
    dtype="float32",
    expert_format=None,
)


class ThreadLike:
    """An `EngineLink` that can only be started and stopped."""

    def __init__(self, refuses: str | None = None) -> None:
        self.info = INFO
        self.sent: list[ToEngine] = []
        self._refuses = refuses

    @property
    def tokenizer(self) -> Tokenizer:
        raise AssertionError("nobody asks")

    async def start(self) -> None:
        if self._refuses is not None:
            raise ValueError(self._refuses)

    def send(self, message: ToEngine) -> None:
        self.sent.append(message)

    async def stop(self, timeout_s: float) -> None:
        self.send(Stop())


def supervisor_of(link: ThreadLike, deaths: list[str]) -> Supervisor:
    return Supervisor(lambda: link, Restarts(), lambda: deaths.append("died"))


async def test_a_thread_that_hangs_is_not_killed_and_one_that_has_failed_stays_dead():
    link, deaths = ThreadLike(), list[str]()
    supervisor = supervisor_of(link, deaths)
    await supervisor.start()
    assert (supervisor.state, supervisor.info) == ("ready", INFO)
    supervisor.kill()
    assert (supervisor.state, link.sent, deaths) == ("ready", [], [])
    supervisor.ended("it broke")
    assert (supervisor.state, supervisor.num_restarts, deaths) == ("dead", 0, ["died"])
    with pytest.raises(EngineDead, match="the engine is dead: it broke"):
        supervisor.require_ready()
    await supervisor.drain()
    await supervisor.stop(0.0)
    assert (supervisor.state, link.sent) == ("dead", [Stop()])


async def test_an_engine_that_was_drained_and_stopped_is_not_dead():
    link = ThreadLike()
    supervisor = supervisor_of(link, [])
    with pytest.raises(EngineDead, match="the engine is stopped"):
        _ = supervisor.info
    await supervisor.start()
    await supervisor.drain()
    assert supervisor.state == "draining"
    await supervisor.stop(0.0)
    supervisor.send(Stop())  # goes nowhere
    assert (supervisor.state, supervisor.link, link.sent) == ("stopped", None, [Stop()])


async def test_what_a_model_is_refused_for_is_raised_and_kept():
    supervisor = supervisor_of(ThreadLike("no such file"), [])
    with pytest.raises(ValueError, match="no such file"):
        await supervisor.start()
    assert (supervisor.state, supervisor.error) == ("dead", "no such file")
