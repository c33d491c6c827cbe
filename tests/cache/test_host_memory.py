from __future__ import annotations

import ctypes
from pathlib import Path

import pytest

from cache import host_memory
from cache.host_memory import huge_pages, record_memory


def mapping_flags(memory: memoryview) -> set[str]:
    """What the system says of the mapping that holds it: see VmFlags in proc(5)."""
    address = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    is_in = False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        first = line.split()[0]
        if "-" in first and not first.endswith(":"):
            begin, end = (int(part, 16) for part in first.split("-"))
            is_in = begin <= address < end
        elif is_in and first == "VmFlags:":
            return set(line.split()[1:])
    raise AssertionError("no such mapping")


def test_it_is_as_long_as_asked_for_and_zeroed():
    memory = record_memory(3 * 4096)
    assert memory.nbytes == 3 * 4096
    assert not any(memory)
    memory[-1] = 1


def test_its_pages_may_be_huge_and_no_fork_copies_them():
    flags = mapping_flags(record_memory(4 * 1024**2))
    assert "dc" in flags
    if Path("/sys/kernel/mm/transparent_hugepage/enabled").exists():
        assert "hg" in flags


@pytest.mark.parametrize(
    ("text", "setting"),
    [("always [madvise] never\n", "madvise"), ("always madvise [never]\n", "never"), (None, None), ("?", None)],
)
def test_the_systems_setting_is_read(
    text: str | None, setting: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    path = tmp_path / "enabled"
    if text is not None:
        path.write_text(text)
    monkeypatch.setattr(host_memory, "_SETTING", path)
    assert huge_pages() == setting
