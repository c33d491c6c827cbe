"""The packed expert file: one aligned record an expert, inside a valid safetensors file.

Layout: u64 header length, JSON header padded with spaces to 4 KiB, then the records in key order, each a uint8 tensor
of a multiple of 4 KiB. Metadata: format, shapes, the xxh3_64 of every record, the source checkpoint's fingerprint.
"""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import xxhash

from cache.expert_key import ExpertKey

FORMAT_VERSION = "2"
ALIGNMENT = 4096
_MAX_HEADER_NBYTES = 100_000_000  # safetensors' own limit
_CHECKSUM_DIGITS = 16


class PackedFileError(ValueError):
    """The packed file cannot be used as it is; the message says why and what to do."""


@dataclass(frozen=True, slots=True)
class PackedHeader:
    """What a packed file says of itself."""

    format: str
    hidden_size: int
    intermediate_size: int
    source: str  # fingerprint of the checkpoint it was made from
    record_nbytes: int
    data_offset: int  # of the first record, bytes
    keys: tuple[ExpertKey, ...]
    checksums: tuple[str, ...]  # xxh3_64 hex of each record, in the order of keys

    @property
    def file_nbytes(self) -> int:
        return self.data_offset + self.record_nbytes * len(self.keys)


def checksum(record: bytes | bytearray | memoryview) -> str:
    """xxh3_64 of a record as 16 hex digits."""
    return xxhash.xxh3_64_hexdigest(record)


def write_packed_file(
    path: Path,
    *,
    format: str,
    hidden_size: int,
    intermediate_size: int,
    source: str,
    record_nbytes: int,
    keys: Iterable[ExpertKey],
    make_record: Callable[[ExpertKey], bytes | bytearray | memoryview],
    progress: Callable[[int, int], None] | None = None,
) -> None:
    """Write all records under a temporary name, then rename; on any failure nothing of it is left behind.

    `make_record` returns record_nbytes bytes; `progress(done, total)` is told after each. The header's length does not
    depend on the checksums, so it is written last in the space left for it.
    """
    if record_nbytes % ALIGNMENT:
        raise ValueError(f"record size {record_nbytes} is not a multiple of {ALIGNMENT}")
    ordered = sorted(keys)

    def header(checksums: list[str]) -> bytes:
        metadata = {
            "foregate_version": FORMAT_VERSION,
            "format": format,
            "hidden_size": str(hidden_size),
            "intermediate_size": str(intermediate_size),
            "source": source,
            "checksums": "".join(checksums),
        }
        entries: dict[str, object] = {"__metadata__": metadata}
        for i, key in enumerate(ordered):
            offsets = [i * record_nbytes, (i + 1) * record_nbytes]
            entries[key.record_name] = {"dtype": "U8", "shape": [record_nbytes], "data_offsets": offsets}
        text = json.dumps(entries, separators=(",", ":")).encode()
        padded = -(-(8 + len(text)) // ALIGNMENT) * ALIGNMENT
        return struct.pack("<Q", padded - 8) + text.ljust(padded - 8)

    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.partial")
    checksums: list[str] = []
    try:
        with temporary.open("wb") as file:
            file.write(header(["0" * _CHECKSUM_DIGITS] * len(ordered)))
            for key in ordered:
                record = make_record(key)
                if len(record) != record_nbytes:
                    raise ValueError(f"record of {key} has {len(record)} bytes, not {record_nbytes}")
                file.write(record)
                checksums.append(checksum(record))
                if progress is not None:
                    progress(len(checksums), len(ordered))
            file.seek(0)
            file.write(header(checksums))
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def read_packed_header(path: Path) -> PackedHeader:
    """Read and check a packed file's header; raises `PackedFileError` if it is damaged, truncated or not ours."""

    def damaged(why: str) -> PackedFileError:
        return PackedFileError(f"packed expert file {path.name} {why}; delete it and run `foregate convert` again")

    with path.open("rb") as file:
        file_nbytes = os.fstat(file.fileno()).st_size
        prefix = file.read(8)
        length = struct.unpack("<Q", prefix)[0] if len(prefix) == 8 else 0
        if not 2 <= length <= min(_MAX_HEADER_NBYTES, file_nbytes - 8):
            raise damaged("has no valid header")
        text = file.read(length)
    try:
        entries = json.loads(text)
        metadata = entries.pop("__metadata__")
        version = metadata["foregate_version"]
        checksums = metadata["checksums"]
        named = sorted((_key_of(name), tuple(entry["data_offsets"])) for name, entry in entries.items())
        hidden_size, intermediate_size = int(metadata["hidden_size"]), int(metadata["intermediate_size"])
        format, source = str(metadata["format"]), str(metadata["source"])
        record_nbytes = named[0][1][1] - named[0][1][0]
    except (ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
        raise damaged("has a header that cannot be read") from error
    if version != FORMAT_VERSION:
        raise damaged(f"is of version {version}, this Foregate reads version {FORMAT_VERSION}")
    data_offset = 8 + length
    expected = [(i * record_nbytes, (i + 1) * record_nbytes) for i in range(len(named))]
    if data_offset % ALIGNMENT or record_nbytes <= 0 or record_nbytes % ALIGNMENT:
        raise damaged("is not aligned to 4 KiB")
    if [offsets for _, offsets in named] != expected or len(checksums) != _CHECKSUM_DIGITS * len(named):
        raise damaged("has a header that contradicts itself")
    header = PackedHeader(
        format=format,
        hidden_size=hidden_size,
        intermediate_size=intermediate_size,
        source=source,
        record_nbytes=record_nbytes,
        data_offset=data_offset,
        keys=tuple(key for key, _ in named),
        checksums=tuple(checksums[i : i + _CHECKSUM_DIGITS] for i in range(0, len(checksums), _CHECKSUM_DIGITS)),
    )
    if file_nbytes != header.file_nbytes:
        raise damaged(f"is truncated or overlong: {file_nbytes} bytes instead of {header.file_nbytes}")
    return header


def _key_of(name: str) -> ExpertKey:
    layers, layer, experts, expert = name.split(".")
    if (layers, experts) != ("layers", "experts"):
        raise ValueError(name)
    return ExpertKey(int(layer), int(expert))
