"""A conversation in the terminal, with an engine in this process or with a server."""

from __future__ import annotations

import asyncio
import contextlib
import signal
import sys
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing
from typing import Any, Protocol

import httpx

from engine.async_engine import AsyncEngine
from engine.config import EngineConfig
from engine.errors import InvalidRequest
from engine.sampling_params import SamplingParams
from server.engine_face import Engine
from server.generation import close_outputs
from server.progress import ProgressDisplay
from server.remote import api_url, authorization, post_events

HELP = "/reset forgets the conversation, /exit leaves; Ctrl-C stops an answer"

Messages = list[dict[str, Any]]


class Partner(Protocol):
    """Who answers."""

    def reply(self, messages: Messages) -> AsyncGenerator[str, None]:
        """The answer in pieces; raises `ValueError` with words for the user."""


class EnginePartner:
    """An engine in this process. Answers are as long as `max_tokens` and the context allow."""

    def __init__(self, engine: Engine, *, temperature: float, max_tokens: int) -> None:
        self._engine = engine
        self._temperature = temperature
        self._max_tokens = max_tokens
        self._num_replies = 0

    async def reply(self, messages: Messages) -> AsyncGenerator[str, None]:
        prompt_token_ids = await self._engine.render_chat(messages)
        room = self._engine.info.max_model_len - len(prompt_token_ids)
        params = SamplingParams(temperature=self._temperature, max_tokens=max(1, min(self._max_tokens, room)))
        self._num_replies += 1
        outputs = self._engine.generate(f"chat-{self._num_replies}", prompt_token_ids, params)
        try:
            async for output in outputs:
                if output.error is not None:
                    raise InvalidRequest(output.error)
                yield output.text
        finally:
            await close_outputs(outputs)


class HttpPartner:
    """A server that speaks OpenAI's API at `url`, with or without /v1."""

    def __init__(self, client: httpx.AsyncClient, url: str, fields: dict[str, Any]) -> None:
        self._client = client
        self._url = f"{api_url(url)}/chat/completions"
        self._fields = fields

    async def reply(self, messages: Messages) -> AsyncGenerator[str, None]:
        body = {**self._fields, "messages": messages, "stream": True}
        async with aclosing(post_events(self._client, self._url, body)) as events:
            async for event in events:
                yield "".join(choice["delta"].get("content") or "" for choice in event["choices"])


async def chat_in_process(config: EngineConfig, *, temperature: float, max_tokens: int, once: str | None) -> None:
    """Load the model here and talk to it. Raises what loading raises."""
    display = ProgressDisplay()
    engine = AsyncEngine(config, progress=display)
    with display:
        await engine.start()
    try:
        await _chat(EnginePartner(engine, temperature=temperature, max_tokens=max_tokens), once)
    finally:
        await engine.stop()


async def chat_with_server(url: str, keys: list[str], fields: dict[str, Any], once: str | None) -> None:
    """Talk to a running server; raises `RemoteError` when there is none."""
    async with httpx.AsyncClient(headers=authorization(keys), timeout=httpx.Timeout(10.0, read=None)) as client:
        await _chat(HttpPartner(client, url, fields), once)


async def _chat(partner: Partner, once: str | None) -> None:
    await (converse(partner) if once is None else ask_once(partner, once))


async def say(partner: Partner, messages: Messages, write: Callable[[str], None]) -> str:
    """Write the answer as it comes and return it whole; what was said is returned even when cancelled."""
    pieces: list[str] = []
    try:
        async with aclosing(partner.reply(messages)) as reply:
            async for piece in reply:
                pieces.append(piece)
                write(piece)
    except asyncio.CancelledError:
        pass
    finally:
        write("\n")
    return "".join(pieces)


async def ask_once(partner: Partner, prompt: str) -> None:
    await say(partner, [{"role": "user", "content": prompt}], _write)


async def converse(
    partner: Partner, *, read: Callable[[str], str] = input, write: Callable[[str], None] | None = None
) -> None:
    """Read, answer, repeat, until /exit or the end of the input."""
    write = write or _write
    with contextlib.suppress(ValueError):  # not in the main thread
        signal.signal(signal.SIGINT, signal.default_int_handler)  # asyncio's own would not interrupt `read`
    write(f"{HELP}\n")
    messages: Messages = []
    while True:
        try:
            line = read("> ").strip()
        except (EOFError, KeyboardInterrupt):
            write("\n")
            return
        if line in ("/exit", "/quit"):
            return
        if line == "/reset":
            messages.clear()
        elif line.startswith("/"):
            write(f"{HELP}\n")
        elif line:
            messages.append({"role": "user", "content": line})
            try:
                answer = await _interruptible(say(partner, messages, write))
            except ValueError as exc:
                messages.pop()
                write(f"error: {exc}\n")
            else:
                messages.append({"role": "assistant", "content": answer})


async def _interruptible(work: Any) -> str:
    """Ctrl-C ends this work instead of the program."""
    task: asyncio.Task[str] = asyncio.ensure_future(work)
    loop = asyncio.get_running_loop()
    with contextlib.suppress(NotImplementedError, RuntimeError):  # not in the main thread, or not on Unix
        loop.add_signal_handler(signal.SIGINT, task.cancel)
    try:
        return await task
    finally:
        with contextlib.suppress(NotImplementedError, RuntimeError):
            loop.remove_signal_handler(signal.SIGINT)  # and back to KeyboardInterrupt


def _write(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()
