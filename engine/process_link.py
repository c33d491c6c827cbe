"""The engine in a child process: it may die, be killed or run out of memory, and this process sees it."""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import socket
import subprocess
import sys
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec

from engine.build import Build
from engine.child_messages import FromChild, Load, Loaded, LoadFailed, Loading, Logged
from engine.config import EngineConfig
from engine.errors import EngineDead
from engine.frames import FrameCodec
from engine.link import OnEnd, OnMessage
from engine.messages import Failed, ModelInfo, Stop, ToEngine
from engine.number_tokenizer import NumberTokenizer
from engine.stored_tokenizer import TokenizerState, state_of
from engine.tokenizer import Tokenizer

if TYPE_CHECKING:
    from engine.convert import Progress

_log = logging.getLogger(__name__)

_ROOT = Path(__file__).parents[1]  # where a child finds the package, too
_REAP_S = 0.5  # from the end of what a child sends to its own
_NUM_LAST_LINES = 20  # of what a child wrote that are told when it has died


@dataclass(frozen=True, slots=True)
class _Settings:
    config: EngineConfig
    build: Build
    progress: Progress | None
    on_message: OnMessage
    on_end: OnEnd


class ProcessLink:
    """One child, from its start to its end. It can be killed, and another can take its place."""

    def __init__(
        self,
        config: EngineConfig,
        build: Build,
        progress: Progress | None,
        on_message: OnMessage,
        on_end: OnEnd,
        *,
        tokenizer: Tokenizer | None = None,
    ) -> None:
        """`tokenizer`: loaded before, of the same model."""
        self._settings = _Settings(config, build, progress, on_message, on_end)
        self._codec: FrameCodec[FromChild] = FrameCodec(FromChild)
        self._tokenizer = tokenizer
        self._loaded: Loaded | None = None
        self._transport: asyncio.Transport | None = None
        self._process: subprocess.Popen[bytes] | None = None
        self._is_stopping = False  # somebody knows already that it ends

    @property
    def info(self) -> ModelInfo:
        assert self._loaded is not None
        return self._loaded.info

    @property
    def tokenizer(self) -> Tokenizer:
        assert self._tokenizer is not None
        return self._tokenizer

    @property
    def pid(self) -> int | None:
        return None if self._process is None else self._process.pid

    async def start(self) -> None:
        loop = asyncio.get_running_loop()
        self._output = _Output()
        self._loading: asyncio.Future[Loaded] = loop.create_future()
        self._ended: asyncio.Future[None] = loop.create_future()
        tokenizer = asyncio.ensure_future(self._load_tokenizer())
        try:
            await self._spawn(loop)
            first: set[asyncio.Future[Any]] = {tokenizer, self._loading}  # a child may die before it is told anything
            await asyncio.wait(first, return_when=asyncio.FIRST_COMPLETED)
            state = tokenizer.result()[1] if tokenizer.done() and tokenizer.exception() is None else None
            level = logging.getLogger().level
            self.send_to_child(Load(self._settings.config, self._settings.build, level, state))
            self._loaded = await self._loading  # what is wrong with a model, the engine says best
            self._tokenizer, _ = await tokenizer
        except BaseException:
            self._is_stopping = True
            tokenizer.cancel()
            await asyncio.shield(self._end())
            raise

    def send(self, message: ToEngine) -> None:
        """Raises `ValueError`, `OverflowError` or `TypeError` for what cannot cross."""
        self.send_to_child(message)

    def send_to_child(self, message: ToEngine | Load) -> None:
        frame = self._codec.encode(message)
        if self._transport is not None and not self._transport.is_closing():
            self._transport.write(frame)

    async def stop(self, timeout_s: float) -> None:
        self._is_stopping = True
        if self._loaded is not None:
            self.send(Stop())
            await asyncio.wait({self._ended}, timeout=timeout_s)
        await self._end()

    def again(self) -> ProcessLink:
        """With what the first one settled, so that nothing is measured or converted anew."""
        assert self._loaded is not None
        old = self._settings
        return ProcessLink(
            self._loaded.config, old.build.repeated, None, old.on_message, old.on_end, tokenizer=self._tokenizer
        )

    def kill(self) -> None:
        """At once, as if it had died."""
        if self._process is not None and self._process.returncode is None:
            self._process.kill()

    # What the transport calls.

    def received(self, data: bytes) -> None:
        try:
            for message in self._codec.feed(data):
                self._handle(message)
        except msgspec.DecodeError:
            _log.exception("the engine's process sent what is no message")
            self.kill()

    def hung_up(self) -> None:
        """The child has ended, or is about to."""
        self._transport = None
        self._reaping = asyncio.ensure_future(self._reap())

    def _handle(self, message: FromChild) -> None:
        settings = self._settings
        if isinstance(message, Logged):
            message.log()
        elif isinstance(message, Loading):
            if settings.progress is not None:
                settings.progress(message.what, message.done, message.total)
        elif isinstance(message, Loaded):
            if not self._loading.done():
                self._loading.set_result(message)
        elif isinstance(message, LoadFailed):
            if not self._loading.done():
                self._loading.set_exception(message.exception())
        elif isinstance(message, Failed):
            self._over(message.error)
        else:
            settings.on_message(message)

    async def _spawn(self, loop: asyncio.AbstractEventLoop) -> None:
        ours, theirs = socket.socketpair()
        read_fd, write_fd = os.pipe()
        paths = [str(_ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
        try:
            # an exec, since a process with threads must not fork; a session of its own, since Ctrl-C is its parent's
            self._process = subprocess.Popen(
                [sys.executable, "-m", "engine.child", str(theirs.fileno()), str(os.getpid())],
                stdin=subprocess.DEVNULL,
                stdout=write_fd,
                stderr=write_fd,
                pass_fds=[theirs.fileno()],
                start_new_session=True,
                env={**os.environ, "PYTHONPATH": os.pathsep.join(paths), "PYTHONSAFEPATH": "1"},
            )
        except BaseException:
            ours.close()
            os.close(read_fd)
            raise
        finally:
            theirs.close()
            os.close(write_fd)
        self._transport, _ = await loop.create_unix_connection(lambda: _FrameProtocol(self), sock=ours)
        await loop.connect_read_pipe(lambda: self._output, os.fdopen(read_fd, "rb"))

    async def _load_tokenizer(self) -> tuple[Tokenizer, TokenizerState | None]:
        if self._settings.build.tokenizer == "numbers":
            return NumberTokenizer(), None
        return await asyncio.to_thread(_loaded_tokenizer, self._tokenizer, self._settings.config.model)

    async def _end(self) -> None:
        """Nothing of it is left afterwards."""
        if self._process is None:
            return
        if self._transport is not None:
            if not self._ended.done() and self._loaded is not None:
                _log.warning("the engine's process did not end in time and is killed")
            self.kill()
            self._transport.close()
        await asyncio.wait({self._ended})

    async def _reap(self) -> None:
        assert self._process is not None
        status = await _status(self._process, _REAP_S)
        if status is None:
            self._process.kill()
            status = await _status(self._process, None)
        await self._output.ended(_REAP_S)
        self._ended.set_result(None)
        if self._is_stopping:
            return
        why = _why(status)
        last = "".join(f"\n    {line}" for line in self._output.last_lines)
        _log.error("the engine's process has died: %s%s", why, last and f"; its last output:{last}")
        if not self._loading.done():
            self._loading.set_exception(EngineDead(f"the engine's process died while it loaded: {why}"))
        else:
            self._over(why)

    def _over(self, why: str) -> None:
        if self._loaded is not None and not self._is_stopping:
            self._is_stopping = True
            self._settings.on_end(why)


def _loaded_tokenizer(tokenizer: Tokenizer | None, directory: Path) -> tuple[Tokenizer, TokenizerState]:
    with _torch_hidden():
        tokenizer = tokenizer or Tokenizer(directory)
    return tokenizer, state_of(tokenizer)


@contextmanager
def _torch_hidden() -> Iterator[None]:
    """A tokenizer does not need it, but transformers imports it where it is: seconds, and 180 MB for nothing."""
    if "torch" in sys.modules:
        yield
        return
    os.environ["TRANSFORMERS_NO_ADVISORY_WARNINGS"] = "1"  # that it is not there
    sys.modules["torch"] = None  # type: ignore[assignment]  # as the import system knows what cannot be imported
    try:
        yield
    finally:
        del sys.modules["torch"]


class _FrameProtocol(asyncio.Protocol):
    def __init__(self, link: ProcessLink) -> None:
        self._link = link

    def data_received(self, data: bytes) -> None:
        self._link.received(data)

    def connection_lost(self, exc: Exception | None) -> None:
        self._link.hung_up()


class _Output(asyncio.Protocol):
    """What a child writes itself, such as the last words of a library that aborts: into our log, line by line."""

    def __init__(self) -> None:
        self.last_lines: deque[str] = deque(maxlen=_NUM_LAST_LINES)
        self._partial = b""
        self._end: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    def data_received(self, data: bytes) -> None:
        *lines, self._partial = (self._partial + data).split(b"\n")
        for line in lines:
            self._line(line)

    def connection_lost(self, exc: Exception | None) -> None:
        if self._partial:
            self._line(self._partial)
        self._end.set_result(None)

    async def ended(self, timeout_s: float) -> None:
        """A grandchild may hold it open."""
        await asyncio.wait({self._end}, timeout=timeout_s)

    def _line(self, line: bytes) -> None:
        text = line.decode("utf-8", "replace").rstrip()
        self.last_lines.append(text)
        _log.info("engine: %s", text)


async def _status(process: subprocess.Popen[bytes], timeout_s: float | None) -> int | None:
    try:
        return await asyncio.to_thread(process.wait, timeout_s)
    except subprocess.TimeoutExpired:
        return None


def _why(status: int | None) -> str:
    if status is not None and status < 0:
        name = signal.Signals(-status).name
        hint = "; the system may have been out of memory" if name == "SIGKILL" else ""
        return f"killed by {name}{hint}"
    return f"it ended with status {status}"
