"""Whether a structure can be compiled, found out where it harms nobody: in a process of its own that can be killed."""

from __future__ import annotations

import asyncio
import contextlib
import os
import struct
import sys
from collections.abc import Callable
from pathlib import Path

import msgspec

from engine.byte_lru import ByteLru
from engine.errors import EngineOverloaded, InvalidRequest
from engine.grammar_worker import Cancel, Tokens, Try, Verdict, frame
from engine.sampling_params import Structure

_ROOT = Path(__file__).parents[1]  # where the worker finds the package, too
_VERDICTS_NBYTES = 16 * 1024**2
_MAX_WAITING = 64

_Key = tuple[str, str, str]


class GrammarTrial:
    """`passed` is asked before a request is queued. The process starts with the first question. One event loop."""

    def __init__(self, tokenizer_json: Callable[[], str]) -> None:
        self._tokenizer_json = tokenizer_json
        self._process: asyncio.subprocess.Process | None = None
        self._reading: asyncio.Task[None] | None = None
        self._starting = asyncio.Lock()
        self._answers: dict[int, asyncio.Future[Verdict]] = {}
        self._asked: dict[_Key, tuple[asyncio.Task[Verdict], set[object]]] = {}  # and who waits for it
        self._num_trials = 0
        self._verdicts: ByteLru[_Key, Verdict] = ByteLru(_VERDICTS_NBYTES)

    async def passed(self, structure: Structure) -> Structure:
        """The structure as the engine compiles it at once; raises `InvalidRequest` where it cannot be enforced.

        When everybody who waits for the same one is cancelled, so is its trial. Raises `EngineOverloaded`.
        """
        key = (structure.kind, structure.source, structure.prelude)
        verdict = self._verdicts.get(key)
        if verdict is None:
            verdict = await self._ask(key, structure)
        if verdict.structure is None:
            raise InvalidRequest(f"{structure.param}: {verdict.error}", param=structure.param)
        return msgspec.structs.replace(verdict.structure, param=structure.param)

    async def close(self) -> None:
        """What is being tried ends with `EngineOverloaded`; a later question starts anew."""
        if self._process is not None:
            with contextlib.suppress(ProcessLookupError):
                self._process.terminate()
        if self._reading is not None:
            await self._reading
        self._process = self._reading = None

    async def _ask(self, key: _Key, structure: Structure) -> Verdict:
        if key not in self._asked:
            if len(self._asked) >= _MAX_WAITING:
                raise EngineOverloaded(f"{_MAX_WAITING} grammars wait to be compiled")
            self._asked[key] = asyncio.ensure_future(self._try(structure)), set()
        task, waiters = self._asked[key]
        me = object()
        waiters.add(me)
        try:
            verdict = await asyncio.shield(task)
        finally:
            waiters.discard(me)
            if not waiters:
                task.cancel()
                self._asked.pop(key, None)
        if not verdict.is_broken:
            kept = verdict.structure.source if verdict.structure is not None else ""
            self._verdicts.put(key, verdict, 500 + len(key[1]) + len(kept))
        return verdict

    async def _try(self, structure: Structure) -> Verdict:
        async with self._starting:
            try:
                if self._process is None:
                    await self._start()
            except ValueError as error:
                return Verdict(0, error=f"this model's tokenizer does not allow it: {error}", is_broken=True)
        assert self._process is not None
        assert self._process.stdin is not None
        self._num_trials += 1
        trial_id = self._num_trials
        answer: asyncio.Future[Verdict] = asyncio.get_running_loop().create_future()
        self._answers[trial_id] = answer
        self._process.stdin.write(frame(Try(trial_id, structure)))
        try:
            return await answer
        except asyncio.CancelledError:
            if self._process is not None and self._process.stdin is not None:
                self._process.stdin.write(frame(Cancel(trial_id)))
            raise
        finally:
            del self._answers[trial_id]

    async def _start(self) -> None:
        tokenizer_json = await asyncio.to_thread(self._tokenizer_json)
        paths = [str(_ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
        kept = {name: os.environ[name] for name in ("PATH", "LANG", "LC_ALL") if name in os.environ}
        self._process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "engine.grammar_worker"),
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            env={**kept, "PYTHONPATH": os.pathsep.join(paths), "PYTHONSAFEPATH": "1"},  # no keys
        )
        assert self._process.stdin is not None
        self._process.stdin.write(frame(Tokens(tokenizer_json)))
        self._reading = asyncio.ensure_future(self._read(self._process))

    async def _read(self, process: asyncio.subprocess.Process) -> None:
        assert process.stdout is not None
        with contextlib.suppress(asyncio.IncompleteReadError, ConnectionError):
            while True:
                (nbytes,) = struct.unpack("<I", await process.stdout.readexactly(4))
                verdict = msgspec.msgpack.decode(await process.stdout.readexactly(nbytes), type=Verdict)
                answer = self._answers.get(verdict.trial_id)
                if answer is not None and not answer.done():
                    answer.set_result(verdict)
        # it has died; the next trial starts another
        self._process = None
        for answer in self._answers.values():
            if not answer.done():
                answer.set_exception(EngineOverloaded("the compiler of grammars was restarted"))
        await process.wait()
