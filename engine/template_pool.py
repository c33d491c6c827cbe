"""Chat templates rendered where they can do no harm: in processes of their own, which are killed if need be."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import struct
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec

from engine.errors import InvalidRequest
from engine.template_worker import Rendered, Rendering, frame

_ROOT = str(Path(__file__).parents[1])  # where a worker finds the package, too
RENDER_S = 5.0
_MAX_WORKERS = 2  # so that one template that hangs does not hold up all chats
_GRACE_S = 5.0  # beyond what a worker allows itself


class TemplatePool:
    """`render` from one event loop; workers start when they are needed and stay."""

    def __init__(self, render_s: float = RENDER_S) -> None:
        self._render_s = render_s
        self._idle: list[asyncio.subprocess.Process] = []
        self._places = asyncio.Semaphore(_MAX_WORKERS)

    async def render(
        self,
        template: str,
        messages: Sequence[Mapping[str, Any]],
        variables: Mapping[str, Any],
        *,
        continue_final_message: bool = False,
    ) -> str:
        """`engine.chat_template.render`; raises `InvalidRequest` where that refuses, or takes too long."""
        asked = frame(Rendering(template, list(map(dict, messages)), dict(variables), continue_final_message))
        async with self._places:
            worker = self._idle.pop() if self._idle else await _start(self._render_s)
            try:
                rendered = await asyncio.wait_for(_ask(worker, asked), self._render_s + _GRACE_S)
            except (asyncio.IncompleteReadError, ConnectionError) as error:
                if await worker.wait() != -signal.SIGALRM:
                    raise RuntimeError(f"a template's process ended with status {worker.returncode}") from error
                raise self._too_slow() from error
            except asyncio.TimeoutError as error:
                await asyncio.shield(_end(worker))
                raise self._too_slow() from error
            except BaseException:  # nobody waits for what it still says
                await asyncio.shield(_end(worker))
                raise
            self._idle.append(worker)
        if rendered.text is None:
            raise InvalidRequest(
                f"the model's chat template refuses these messages: {rendered.refusal}", param="messages"
            )
        return rendered.text

    def _too_slow(self) -> InvalidRequest:
        return InvalidRequest(
            f"the model's chat template takes longer than {self._render_s:g} s for these messages", param="messages"
        )

    async def close(self) -> None:
        """What renders meanwhile ends by itself."""
        while self._idle:
            await _end(self._idle.pop())


async def _start(render_s: float) -> asyncio.subprocess.Process:
    return await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "engine.template_worker", str(render_s)),
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
        env={"PYTHONPATH": os.pathsep.join([_ROOT, *filter(None, sys.path)]), "PYTHONSAFEPATH": "1"},  # and no keys
    )


async def _ask(worker: asyncio.subprocess.Process, asked: bytes) -> Rendered:
    assert worker.stdin is not None
    assert worker.stdout is not None
    worker.stdin.write(asked)
    await worker.stdin.drain()
    (nbytes,) = struct.unpack("<I", await worker.stdout.readexactly(4))
    return msgspec.json.decode(await worker.stdout.readexactly(nbytes), type=Rendered)


async def _end(worker: asyncio.subprocess.Process) -> None:
    with contextlib.suppress(ProcessLookupError):
        worker.kill()
    assert worker.stdin is not None
    worker.stdin.close()
    await worker.wait()
