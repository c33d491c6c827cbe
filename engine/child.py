"""The engine's own process: `python -m engine.child FD PARENT`, started by `engine.process_link` and by nobody else.

FD is its end of a socket pair. It ends when the other end is closed, whatever it is doing, and ignores the signals
that a terminal or an init system sends to all of a service: its parent says when to stop.
"""

from __future__ import annotations

import ctypes
import faulthandler
import logging
import os
import queue
import signal
import socket
import sys
import threading
import time
from collections.abc import Iterator

from engine.child_messages import FromChild, Load, Loaded, LoadFailed, Loading, Logged, ToChild
from engine.frames import FrameSocket
from engine.messages import ToEngine
from engine.stored_tokenizer import StoredTokenizer
from engine.threads import wait_passively

_PR_SET_PDEATHSIG = 1
_PROGRESS_INTERVAL_S = 0.05


class _Parent:
    """The other end; without it there is nothing to do here."""

    def __init__(self, sock: socket.socket) -> None:
        self._socket: FrameSocket[ToChild] = FrameSocket(sock, ToChild)

    def send(self, message: FromChild) -> None:
        try:
            self._socket.send(message)
        except OSError:
            os._exit(1)

    def messages(self) -> Iterator[ToChild]:
        return self._socket.messages()


class _LogToParent(logging.Handler):
    def __init__(self, parent: _Parent) -> None:
        super().__init__()
        self._parent = parent

    def emit(self, record: logging.LogRecord) -> None:
        try:
            text = self.format(record).encode("utf-8", "replace").decode()
        except Exception:
            self.handleError(record)
            return
        self._parent.send(Logged(record.name, record.levelno, record.created, text))


class _Progress:
    """Not more often than anybody looks."""

    def __init__(self, parent: _Parent) -> None:
        self._parent = parent
        self._told: tuple[str, float] = ("", 0.0)

    def __call__(self, what: str, done: int, total: int) -> None:
        now = time.monotonic()
        if what != self._told[0] or done == total or now - self._told[1] > _PROGRESS_INTERVAL_S:
            self._told = (what, now)
            self._parent.send(Loading(what, done, total))


def main(fd: int, parent_pid: int) -> int:
    """Returns the exit status."""
    _die_with(parent_pid)
    faulthandler.enable()
    parent = _Parent(socket.socket(fileno=fd))
    messages = parent.messages()
    wait_passively()
    from engine.service import EngineService  # seconds of torch, while the parent loads the tokenizer

    load = next(messages, None)
    if not isinstance(load, Load):
        return 1
    logging.basicConfig(level=load.log_level, handlers=[_LogToParent(parent)], format="%(message)s", force=True)
    inbox: queue.SimpleQueue[ToEngine] = queue.SimpleQueue()
    threading.Thread(target=_receive, args=(messages, inbox), name="inbox", daemon=True).start()
    try:
        tokenizer = None if load.tokenizer is None else StoredTokenizer(load.tokenizer)
        engine = load.build(load.config, _Progress(parent), tokenizer)
    except Exception as error:
        failed = LoadFailed(type(error).__name__, str(error))
        if isinstance(failed.exception(), RuntimeError):
            logging.getLogger(__name__).exception("the engine could not be loaded")
        parent.send(failed)
        return 1
    parent.send(Loaded(engine.info, engine.config))
    return 0 if EngineService(engine, inbox, parent.send).run() else 1


def _receive(messages: Iterator[ToChild], inbox: queue.SimpleQueue[ToEngine]) -> None:
    try:
        for message in messages:
            assert not isinstance(message, Load)
            inbox.put(message)
    finally:
        os._exit(1)  # the parent is gone, or speaks another language: nobody will read what is computed


def _die_with(parent_pid: int) -> None:
    for signum in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(signum, signal.SIG_IGN)
    # beside the socket, which takes a thread that runs to see
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent_pid:
        os._exit(1)


if __name__ == "__main__":
    status = main(int(sys.argv[1]), int(sys.argv[2]))
    sys.stderr.flush()
    os._exit(status)  # no thread of a library can hold it up
