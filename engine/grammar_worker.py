"""The process in which grammars are tried out: `python -m engine.grammar_worker`, started by `engine.grammar_trial`.

It loads the tokenizer once and forks for each grammar, so that one which takes too long, too much memory, or crashes
the compiler, ends a process that nobody else needs. Speaks msgpack frames over its standard input and output.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import os
import resource
import selectors
import signal
import struct
import sys
from collections import deque
from pathlib import Path
from typing import NoReturn

import msgspec

from engine.errors import InvalidRequest
from engine.grammar import Grammars, prepared
from engine.sampling_params import Structure

COMPILE_S = 2.0  # of processor time, so that a busy machine refuses nothing that an idle one takes
_WALL_S = 15.0
_MAX_GROWTH_NBYTES = 512 * 1024**2
_MAX_CHILDREN = 2


class Tokens(msgspec.Struct, frozen=True, tag=True):
    """To the worker, once: the tokenizer."""

    tokenizer_json: str


class Try(msgspec.Struct, frozen=True, tag=True):
    """To the worker: can this be compiled?"""

    trial_id: int
    structure: Structure


class Cancel(msgspec.Struct, frozen=True, tag=True):
    """To the worker: nobody wants to know any more. There is no answer then."""

    trial_id: int


class Verdict(msgspec.Struct, frozen=True):
    """From the worker: the structure, prepared and measured, or why it is refused."""

    trial_id: int
    structure: Structure | None = None
    error: str | None = None
    is_broken: bool = False  # no tokenizer, no trials


def frame(message: msgspec.Struct) -> bytes:
    body = msgspec.msgpack.encode(message)
    return struct.pack("<I", len(body)) + body


class _Child:
    def __init__(self, trial: Try, pid: int, fd: int) -> None:
        self.trial = trial
        self.pid = pid
        self.fd = fd
        self.output = bytearray()


class _Worker:
    def __init__(self) -> None:
        self._grammars: Grammars | None = None
        self._broken: str | None = None
        self._selector = selectors.DefaultSelector()
        self._waiting: deque[Try] = deque()
        self._children: dict[int, _Child] = {}  # by trial
        self._input = bytearray()

    def run(self) -> None:
        """Until the input ends, which is when the server has."""
        self._selector.register(0, selectors.EVENT_READ)
        while True:
            for key, _ in self._selector.select():
                if key.fd == 0:
                    data = os.read(0, 1 << 16)
                    if not data:
                        return
                    self._input += data
                    self._take_input()
                else:
                    self._take_output(key.data)
            while self._waiting and len(self._children) < _MAX_CHILDREN:
                self._fork(self._waiting.popleft())

    def kill_all(self) -> None:
        for child in self._children.values():
            _kill(child.pid)

    def _take_input(self) -> None:
        while len(self._input) >= 4:
            (nbytes,) = struct.unpack_from("<I", self._input)
            if len(self._input) < 4 + nbytes:
                return
            message = msgspec.msgpack.decode(bytes(self._input[4 : 4 + nbytes]), type=Tokens | Try | Cancel)
            del self._input[: 4 + nbytes]
            if isinstance(message, Tokens):
                self._load(message)
            elif isinstance(message, Try):
                self._waiting.append(message)
            else:
                self._cancel(message.trial_id)

    def _load(self, message: Tokens) -> None:
        try:
            self._grammars = Grammars(message.tokenizer_json)
        except ValueError as error:
            self._broken = f"this model's tokenizer does not allow it: {str(error)[:200]}"
        gc.collect()
        gc.freeze()  # children share these pages

    def _cancel(self, trial_id: int) -> None:
        self._waiting = deque(trial for trial in self._waiting if trial.trial_id != trial_id)
        child = self._children.get(trial_id)
        if child is not None:
            _kill(child.pid)
            self._reap(child)

    def _fork(self, trial: Try) -> None:
        if self._grammars is None:
            _answer(Verdict(trial.trial_id, error=self._broken, is_broken=True))
            return
        read_fd, write_fd = os.pipe()
        pid = os.fork()
        if pid == 0:
            _try_in_child(self._grammars, trial, write_fd)
        os.close(write_fd)
        child = _Child(trial, pid, read_fd)
        self._children[trial.trial_id] = child
        self._selector.register(read_fd, selectors.EVENT_READ, child)

    def _take_output(self, child: _Child) -> None:
        data = os.read(child.fd, 1 << 16)
        child.output += data
        if data:
            return
        status = self._reap(child)
        if os.WIFEXITED(status) and os.WEXITSTATUS(status) == 0:
            _write(bytes(child.output))
            return
        took_long = os.WIFSIGNALED(status) and os.WTERMSIG(status) in (signal.SIGPROF, signal.SIGALRM)
        why = f"compiling it takes longer than {COMPILE_S:g} s" if took_long else "compiling it takes too much memory"
        _answer(Verdict(child.trial.trial_id, error=why))

    def _reap(self, child: _Child) -> int:
        self._selector.unregister(child.fd)
        os.close(child.fd)
        del self._children[child.trial.trial_id]
        return os.waitpid(child.pid, 0)[1]


def _try_in_child(grammars: Grammars, trial: Try, write_fd: int) -> NoReturn:
    """Ends the process, in whatever way."""
    status = 1
    try:
        null = os.open(os.devnull, os.O_RDWR)
        for fd in (0, 1, 2):
            os.dup2(null, fd)
        _limit_myself()
        verdict = frame(_verdict(grammars, trial))
        while verdict:
            verdict = verdict[os.write(write_fd, verdict) :]
        status = 0
    finally:
        os._exit(status)


def _limit_myself() -> None:
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    statm = Path("/proc/self/statm")
    if statm.exists():
        limit = int(statm.read_text().split()[0]) * resource.getpagesize() + _MAX_GROWTH_NBYTES
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    # their default action ends the process, whatever code it is in
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    signal.signal(signal.SIGPROF, signal.SIG_DFL)
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    signal.setitimer(signal.ITIMER_PROF, COMPILE_S)
    signal.setitimer(signal.ITIMER_REAL, _WALL_S)


def _verdict(grammars: Grammars, trial: Try) -> Verdict:
    before = _allocated_nbytes()
    try:
        structure = prepared(trial.structure)
        matcher = grammars.compile(structure)
    except InvalidRequest as error:
        return Verdict(trial.trial_id, error=str(error))
    nbytes = max(0, _allocated_nbytes() - before)
    del matcher
    return Verdict(trial.trial_id, structure=msgspec.structs.replace(structure, nbytes=nbytes))


class _MallInfo2(ctypes.Structure):
    """glibc's struct mallinfo2 (mallinfo(3))."""

    _fields_ = tuple(
        (name, ctypes.c_size_t)
        for name in (
            *("arena", "ordblks", "smblks", "hblks", "hblkhd"),
            *("usmblks", "fsmblks", "uordblks", "fordblks", "keepcost"),
        )
    )


def _allocated_nbytes() -> int:
    """Of this process by malloc; 0 where the C library does not tell."""
    mallinfo2 = getattr(ctypes.CDLL(None), "mallinfo2", None)
    if mallinfo2 is None:
        return 0
    mallinfo2.restype = _MallInfo2
    info = mallinfo2()
    return int(info.uordblks) + int(info.hblkhd)


def _answer(verdict: Verdict) -> None:
    _write(frame(verdict))


def _write(data: bytes) -> None:
    while data:
        data = data[os.write(1, data) :]


def _kill(pid: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)


if __name__ == "__main__":
    worker = _Worker()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a terminal sends it to all; the server's end is what counts
    signal.signal(signal.SIGTERM, lambda *_: sys.exit())
    try:
        with contextlib.suppress(BrokenPipeError):
            worker.run()
    finally:
        worker.kill_all()
