"""server/chat_terminal.py."""

from __future__ import annotations

from collections.abc import Callable

import httpx
import pytest

from engine.errors import ConfigError
from server.chat_terminal import EnginePartner, HttpPartner, ask_once, converse
from tests.server.fake_engine import FakeEngine, Script


class Terminal:
    def __init__(self, *lines: str) -> None:
        self._lines = list(lines)
        self.text = ""

    def read(self, prompt: str) -> str:
        if not self._lines:
            raise EOFError
        return self._lines.pop(0)

    def write(self, text: str) -> None:
        self.text += text


def partner(engine: FakeEngine) -> EnginePartner:
    return EnginePartner(engine, temperature=0.0, max_tokens=512)


async def test_a_conversation_remembers_until_it_is_reset(engine: FakeEngine) -> None:
    terminal = Terminal("one", "two", "", "/reset", "three", "/exit", "four")
    seen = []
    render = engine.render_chat

    async def remember(messages: list[dict[str, str]], *, add_generation_prompt: bool = True) -> list[int]:
        seen.append([message["content"] for message in messages])
        return (await render(messages))[:8]

    engine.render_chat = remember  # type: ignore[method-assign]
    await converse(partner(engine), read=terminal.read, write=terminal.write)
    assert seen == [["one"], ["one", "Paris.", "two"], ["three"]]
    assert terminal.text.count("Paris.\n") == 3
    assert engine.num_open == 0


async def test_an_error_is_told_and_the_conversation_goes_on(engine: FakeEngine) -> None:
    terminal = Terminal("x" * 100, "hi", "/what")
    await converse(partner(engine), read=terminal.read, write=terminal.write)
    assert "error: This model's maximum context length is 64 tokens." in terminal.text
    assert "Paris." in terminal.text
    assert terminal.text.count("/reset forgets") == 2


async def test_once_answers_and_returns(engine: FakeEngine, capsys: pytest.CaptureFixture[str]) -> None:
    await ask_once(partner(engine), "hi")
    assert capsys.readouterr().out == "Paris.\n"


@pytest.mark.parametrize("url", ["http://test", "http://test/", "http://test/v1", "http://test/v1/"])
async def test_a_server_answers_as_the_engine_does(
    client: httpx.AsyncClient, capsys: pytest.CaptureFixture[str], url: str
) -> None:
    await ask_once(HttpPartner(client, url, {"temperature": 0}), "hi")
    assert capsys.readouterr().out == "Paris.\n"


async def test_what_the_server_refuses_is_told_in_its_words(
    connect: Callable[..., httpx.AsyncClient], engine: FakeEngine
) -> None:
    with pytest.raises(ConfigError, match=r"temperature: .* less than or equal to 2"):
        await ask_once(HttpPartner(connect(), "http://test", {"temperature": 9}), "hi")
    engine.script = Script(finish_reason="error", error="broken")
    with pytest.raises(ConfigError, match="broken"):
        await ask_once(HttpPartner(connect(), "http://test", {}), "hi")


async def test_a_server_that_is_not_there_is_told() -> None:
    async with httpx.AsyncClient(trust_env=False) as http:
        with pytest.raises(ConfigError, match="is a server running there"):
            await ask_once(HttpPartner(http, "http://127.0.0.1:9", {}), "hi")
