"""Memory for records: huge pages, so that a read from disk into it is few long pieces and not one for each 4 KiB."""

from __future__ import annotations

import contextlib
import mmap
from pathlib import Path

_SETTING = Path("/sys/kernel/mm/transparent_hugepage/enabled")
_HUGE_PAGE_NBYTES = 2 * 1024**2
_ADVICE = ("MADV_HUGEPAGE", "MADV_DONTFORK")  # a child that copied pages on write would break reads under way


def record_memory(nbytes: int) -> memoryview:
    """Zeroed and page-aligned; committed by the system as it is first used, by the huge page where it has those.

    Disks read faster into it, and reading takes less of the processor (`docs/LOG.md`, 2026-11-24). A system without
    transparent huge pages ignores the wish.
    """
    whole = -(-nbytes // _HUGE_PAGE_NBYTES) * _HUGE_PAGE_NBYTES
    memory = mmap.mmap(-1, whole, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    for name in _ADVICE:
        with contextlib.suppress(AttributeError, OSError):  # another system, or a kernel built without
            memory.madvise(getattr(mmap, name))
    return memoryview(memory)[:nbytes]


def huge_pages() -> str | None:
    """When the system gives huge pages: `always`, `madvise` (to who asks, as `record_memory` does) or `never`.

    None: it does not say.
    """
    try:
        text = _SETTING.read_text()
    except OSError:
        return None
    return text.partition("[")[2].partition("]")[0] or None
