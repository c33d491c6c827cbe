"""Reads expert records from the packed file, by O_DIRECT where the file system has it, and vouches for each byte."""

from __future__ import annotations

import errno
import logging
import mmap
import os
from collections.abc import Sequence
from pathlib import Path

from cache.expert_key import ExpertKey
from cache.packed_file import ALIGNMENT, PackedFileError, PackedHeader, checksum, read_packed_header
from cache.stats import Link

_log = logging.getLogger(__name__)


class ExpertReadError(RuntimeError):
    """An expert's record could not be read or is corrupt; nothing was or may be computed with it."""

    def __init__(self, key: ExpertKey, why: str) -> None:
        super().__init__(f"expert record {key.record_name}: {why}")
        self.why = why
        self.key = key


class ExpertStore:
    """The lowest tier. `read_into` may be called from several threads at once.

    `direct` is whether reads bypass the page cache; a file system that refuses O_DIRECT is read buffered, with a
    warning.
    """

    def __init__(self, path: Path) -> None:
        """Open a packed file; raises `PackedFileError` if it is damaged and `FileNotFoundError` if it is absent."""
        self.path = path
        self.header: PackedHeader = read_packed_header(path)
        self._index = {key: i for i, key in enumerate(self.header.keys)}
        self._fd, self.direct = _open(path)

    @property
    def record_nbytes(self) -> int:
        return self.header.record_nbytes

    def __len__(self) -> int:
        return len(self._index)

    def __contains__(self, key: ExpertKey) -> bool:
        return key in self._index

    def position(self, key: ExpertKey) -> int:
        """Where the record lies: records of neighbouring positions are neighbours in the file."""
        return self._index[key]

    def link(self, key: ExpertKey) -> Link:
        """Where from every record is read."""
        return "disk"

    def read_into(self, key: ExpertKey, buffer: memoryview) -> None:
        """Fill buffer [record_nbytes], 4 KiB-aligned, with the expert's record and verify its checksum.

        Raises `ExpertReadError` on an I/O error, a short read or a wrong checksum; the buffer is then worthless.
        """
        (error,) = self.read_run([key], [buffer])
        if error is not None:
            raise error

    def read_run(self, keys: Sequence[ExpertKey], buffers: Sequence[memoryview]) -> list[ExpertReadError | None]:
        """Read neighbours, in ascending order, in one go; -> what is wrong with each of them, as `read_into` says."""
        nbytes = self.record_nbytes
        first = self._index[keys[0]]
        offset = self.header.data_offset + first * nbytes
        total, done = nbytes * len(keys), 0
        why = ""
        try:
            while done < total:
                skip, within = divmod(done, nbytes)
                left = [buffers[skip][within:nbytes], *(buffer[:nbytes] for buffer in buffers[skip + 1 :])]
                num_read = os.preadv(self._fd, left, offset + done)
                done += num_read
                if num_read == 0 or (self.direct and done < total and done % ALIGNMENT):
                    break
        except OSError as error:
            why = f"disk read failed ({os.strerror(error.errno or errno.EIO)})"
        errors: list[ExpertReadError | None] = []
        for i, (key, buffer) in enumerate(zip(keys, buffers, strict=True)):
            if done < (i + 1) * nbytes:
                here = max(0, done - i * nbytes)
                errors.append(ExpertReadError(key, why or f"short read, {here} of {nbytes} bytes"))
            elif checksum(buffer[:nbytes]) != self.header.checksums[first + i]:
                errors.append(ExpertReadError(key, "checksum does not match, the packed file is corrupt"))
            else:
                errors.append(None)
        return errors

    def demote(self, key: ExpertKey, record: memoryview) -> None:
        """Nothing: disk holds every record."""

    def fileno(self) -> int:
        """Of the open packed file."""
        return self._fd

    def close(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1


def _open(path: Path) -> tuple[int, bool]:
    """-> file descriptor, whether it is O_DIRECT. A probe read finds out, since some file systems refuse only then."""
    if hasattr(os, "O_DIRECT"):
        fd = -1
        try:
            fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_DIRECT)
            with mmap.mmap(-1, ALIGNMENT) as probe:
                os.preadv(fd, [probe], 0)
            return fd, True
        except OSError as error:
            if fd >= 0:
                os.close(fd)
            if error.errno != errno.EINVAL:
                raise PackedFileError(f"cannot read packed expert file {path.name}: {error.strerror}") from error
    _log.warning("file system of %s refuses O_DIRECT: experts are read through the page cache", path.name)
    return os.open(path, os.O_RDONLY | os.O_CLOEXEC), False
