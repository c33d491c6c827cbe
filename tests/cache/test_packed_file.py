from __future__ import annotations

import json
import struct
from pathlib import Path

import pytest
from safetensors import safe_open

from cache.packed_file import ALIGNMENT, PackedFileError, checksum, read_packed_header, write_packed_file
from tests.cache.conftest import KEYS, RECORD_NBYTES, record_of, write_records


def test_the_file_is_valid_safetensors_with_one_aligned_record_an_expert(packed: Path):
    header = read_packed_header(packed)
    assert header.keys == tuple(sorted(KEYS))
    assert header.data_offset % ALIGNMENT == 0
    with safe_open(packed, framework="numpy") as file:
        assert set(file.keys()) == {key.record_name for key in KEYS}
        for key in KEYS:
            assert file.get_tensor(key.record_name).tobytes() == record_of(key)
        assert file.metadata()["format"] == "int8"


def test_records_lie_where_the_header_says_and_have_its_checksums(packed: Path):
    header, content = read_packed_header(packed), packed.read_bytes()
    for i, key in enumerate(header.keys):
        start = header.data_offset + i * header.record_nbytes
        record = content[start : start + RECORD_NBYTES]
        assert record == record_of(key)
        assert checksum(record) == header.checksums[i]
    assert len(set(header.checksums)) == len(KEYS)


def test_the_same_records_give_the_same_bytes(tmp_path: Path):
    assert write_records(tmp_path / "a").read_bytes() == write_records(tmp_path / "b").read_bytes()


@pytest.mark.parametrize("num_missing", [1, RECORD_NBYTES, 100_000])
def test_a_truncated_file_is_refused_with_the_cure(packed: Path, num_missing: int):
    packed.write_bytes(packed.read_bytes()[:-num_missing])
    with pytest.raises(PackedFileError, match=r"truncated.*delete it and run `foregate convert` again"):
        read_packed_header(packed)


@pytest.mark.parametrize("content", [b"", b"abc", b"\xff" * 64, struct.pack("<Q", 40) + b"not json".ljust(40)])
def test_a_file_that_is_something_else_is_refused(packed: Path, content: bytes):
    packed.write_bytes(content)
    with pytest.raises(PackedFileError, match="foregate convert"):
        read_packed_header(packed)


@pytest.mark.parametrize(
    ("field", "value", "why"),
    [("foregate_version", "999", "version 999"), ("checksums", "00", "contradicts"), ("hidden_size", "x", "read")],
)
def test_a_header_that_lies_is_refused(packed: Path, field: str, value: str, why: str):
    content = packed.read_bytes()
    (length,) = struct.unpack("<Q", content[:8])
    entries = json.loads(content[8 : 8 + length])
    entries["__metadata__"][field] = value
    packed.write_bytes(content[:8] + json.dumps(entries).encode().ljust(length) + content[8 + length :])
    with pytest.raises(PackedFileError, match=why):
        read_packed_header(packed)


def test_a_failure_while_writing_leaves_nothing_behind(tmp_path: Path):
    def fail_late(key):
        if key == KEYS[5]:
            raise OSError(28, "No space left on device")
        return record_of(key)

    with pytest.raises(OSError, match="No space left"):
        write_packed_file(
            tmp_path / "experts",
            format="int8",
            hidden_size=32,
            intermediate_size=64,
            source="test",
            record_nbytes=RECORD_NBYTES,
            keys=KEYS,
            make_record=fail_late,
        )
    assert list(tmp_path.iterdir()) == []
