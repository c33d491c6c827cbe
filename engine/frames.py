"""Messages on a stream socket: each a length of four bytes and then msgpack. Knows no messages and never pickles."""

from __future__ import annotations

import socket
import struct
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Generic, TypeVar

import msgspec

T = TypeVar("T")

_LENGTH = struct.Struct("<I")
_CHUNK_NBYTES = 1 << 18


class FrameCodec(Generic[T]):
    """Encodes any message; decodes those of one type, or of a union of tagged ones."""

    def __init__(self, received: Any) -> None:
        self._encoder = msgspec.msgpack.Encoder(enc_hook=_plain)
        self._decoder: msgspec.msgpack.Decoder[T] = msgspec.msgpack.Decoder(received, dec_hook=_path)
        self._partial = bytearray()

    def encode(self, message: object) -> bytes:
        """Raises `ValueError`, `OverflowError` or `TypeError` for what cannot cross, such as half a surrogate pair."""
        body = self._encoder.encode(message)
        return _LENGTH.pack(len(body)) + body

    def feed(self, data: bytes) -> Iterator[T]:
        """The messages that are complete with this; raises `msgspec.DecodeError` for what is none."""
        self._partial += data
        at = 0
        while len(self._partial) - at >= _LENGTH.size:
            (size,) = _LENGTH.unpack_from(self._partial, at)
            end = at + _LENGTH.size + size
            if len(self._partial) < end:
                break
            body = bytes(memoryview(self._partial)[at + _LENGTH.size : end])
            at = end
            yield self._decoder.decode(body)
        del self._partial[:at]


class FrameSocket(Generic[T]):
    """A blocking end: `send` from any thread, `messages` from one."""

    def __init__(self, sock: socket.socket, received: Any) -> None:
        self._sock = sock
        self._codec: FrameCodec[T] = FrameCodec(received)
        self._sending = threading.Lock()

    def send(self, message: object) -> None:
        """Waits while the other end does not read; raises `OSError` when it is gone."""
        frame = self._codec.encode(message)
        with self._sending:
            self._sock.sendall(frame)

    def messages(self) -> Iterator[T]:
        """Ends with the other end."""
        while True:
            try:
                data = self._sock.recv(_CHUNK_NBYTES)
            except ConnectionError:
                return
            if not data:
                return
            yield from self._codec.feed(data)


def _plain(value: object) -> object:
    if isinstance(value, Path):
        return str(value)
    raise TypeError(f"a {type(value).__name__} cannot be sent")


def _path(kind: type, value: Any) -> Any:
    if issubclass(kind, Path):
        return Path(value)
    raise TypeError(f"a {kind.__name__} cannot be received")
