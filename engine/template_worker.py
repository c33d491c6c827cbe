"""The process in which chat templates run: `python -m engine.template_worker SECONDS`; see `engine.template_pool`.

One that takes too long or too much memory ends this process by the system's means, whatever code it is in. Takes and
gives frames of JSON over standard input and output.
"""

from __future__ import annotations

import resource
import signal
import struct
import sys
from typing import Any, BinaryIO

import msgspec

from engine.chat_template import TemplateRefusal, render

_MEMORY_NBYTES = 1024**3


class Rendering(msgspec.Struct, frozen=True):
    """To the worker."""

    template: str
    messages: list[dict[str, Any]]
    variables: dict[str, Any]
    continue_final_message: bool


class Rendered(msgspec.Struct, frozen=True):
    """From the worker: the text, or why there is none."""

    text: str | None
    refusal: str | None = None


def frame(message: msgspec.Struct) -> bytes:
    body = msgspec.json.encode(message)
    return struct.pack("<I", len(body)) + body


def _serve(source: BinaryIO, sink: BinaryIO, render_s: float) -> None:
    """Until the input ends, which is when the server has."""
    while header := source.read(4):
        asked = msgspec.json.decode(source.read(struct.unpack("<I", header)[0]), type=Rendering)
        signal.setitimer(signal.ITIMER_REAL, render_s)  # its signal's default action ends the process
        sink.write(frame(_rendered(asked)))
        signal.setitimer(signal.ITIMER_REAL, 0)
        sink.flush()


def _rendered(asked: Rendering) -> Rendered:
    try:
        text = render(
            asked.template, asked.messages, asked.variables, continue_final_message=asked.continue_final_message
        )
        text.encode()
    except (TemplateRefusal, UnicodeEncodeError) as refusal:
        return Rendered(None, str(refusal)[:1000].encode("utf-8", "replace").decode())
    return Rendered(text)


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a terminal sends it to all; the server's end is what counts
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_AS, (_MEMORY_NBYTES, _MEMORY_NBYTES))
    _serve(sys.stdin.buffer, sys.stdout.buffer, float(sys.argv[1]))
