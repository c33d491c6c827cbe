from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

import cache.expert_store as expert_store_module
from cache.expert_key import ExpertKey
from cache.expert_store import ExpertReadError, ExpertStore
from cache.packed_file import read_packed_header
from cache.slot_pool import SlotPool
from tests.cache.conftest import KEYS, RECORD_NBYTES, record_of


def test_every_record_is_read_whole(packed: Path):
    store, pool = ExpertStore(packed), SlotPool(1, RECORD_NBYTES)
    for key in KEYS:
        store.read_into(key, pool.buffer(0))
        assert bytes(pool.buffer(0)) == record_of(key)
    assert len(store) == len(KEYS)
    assert KEYS[0] in store
    assert ExpertKey(99, 0) not in store
    store.close()


def test_a_file_system_without_o_direct_is_read_buffered_with_a_warning(packed: Path, monkeypatch, caplog):
    real_open = os.open

    def refuse_direct(path, flags, *args):
        if flags & os.O_DIRECT:
            raise OSError(errno.EINVAL, "Invalid argument")
        return real_open(path, flags, *args)

    monkeypatch.setattr(expert_store_module.os, "open", refuse_direct)
    store, pool = ExpertStore(packed), SlotPool(1, RECORD_NBYTES)
    assert not store.direct
    assert "refuses O_DIRECT" in caplog.text
    store.read_into(KEYS[3], pool.buffer(0))
    assert bytes(pool.buffer(0)) == record_of(KEYS[3])
    store.close()


def test_a_flipped_bit_is_found_before_anything_is_computed_with_it(packed: Path):
    header = read_packed_header(packed)
    content = bytearray(packed.read_bytes())
    content[header.data_offset + 4 * RECORD_NBYTES + 77] ^= 1
    packed.write_bytes(content)
    store, pool = ExpertStore(packed), SlotPool(1, RECORD_NBYTES)
    with pytest.raises(ExpertReadError, match=r"layers\.0\.experts\.4: checksum does not match"):
        store.read_into(KEYS[4], pool.buffer(0))
    store.read_into(KEYS[5], pool.buffer(0))
    store.close()


def test_a_file_that_shrinks_while_open_is_a_short_read(packed: Path):
    store, pool = ExpertStore(packed), SlotPool(1, RECORD_NBYTES)
    with packed.open("r+b") as file:
        file.truncate(store.header.file_nbytes - 100)
    with pytest.raises(ExpertReadError, match="short read"):
        store.read_into(KEYS[-1], pool.buffer(0))
    store.close()


def test_an_io_error_names_the_record(packed: Path, monkeypatch):
    store, pool = ExpertStore(packed), SlotPool(1, RECORD_NBYTES)

    def fail(*args):
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(expert_store_module.os, "preadv", fail)
    with pytest.raises(ExpertReadError, match=r"layers\.1\.experts\.0: disk read failed \(Input/output error\)"):
        store.read_into(ExpertKey(1, 0), pool.buffer(0))
    store.close()


def test_reads_that_come_in_pieces_are_put_together(packed: Path, monkeypatch):
    store, pool = ExpertStore(packed), SlotPool(1, RECORD_NBYTES)
    real_preadv = os.preadv
    monkeypatch.setattr(
        expert_store_module.os, "preadv", lambda fd, buffers, offset: real_preadv(fd, [buffers[0][:4096]], offset)
    )
    store.read_into(KEYS[9], pool.buffer(0))
    assert bytes(pool.buffer(0)) == record_of(KEYS[9])
    store.close()
