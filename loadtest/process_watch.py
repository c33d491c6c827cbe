"""What a process and its children hold of the machine, from Linux's /proc, and whether that grows."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

_PAGE_NBYTES = os.sysconf("SC_PAGE_SIZE")


@dataclass(frozen=True, slots=True)
class Snapshot:
    """Sums over the processes; memory that several of them share counts for each."""

    pids: tuple[int, ...]
    rss_nbytes: int
    num_fds: int
    num_threads: int


def snapshot(pid: int) -> Snapshot:
    """Of `pid` and all below it; raises `ProcessLookupError` if it is gone, `PermissionError` if it is not ours."""
    pids, rss_nbytes, num_fds, num_threads = [], 0, 0, 0
    for process in tree(pid):
        try:
            rss_pages = int(Path(f"/proc/{process}/statm").read_text().split()[1])
            fds = _count(process, "fd")
            threads = _count(process, "task")
        except (FileNotFoundError, ProcessLookupError):
            if process == pid:
                raise ProcessLookupError(f"process {pid} is gone") from None
            continue  # a child that ended meanwhile
        pids.append(process)
        rss_nbytes += rss_pages * _PAGE_NBYTES
        num_fds += fds
        num_threads += threads
    return Snapshot(tuple(pids), rss_nbytes, num_fds, num_threads)


def _count(pid: int, what: str) -> int:
    return sum(1 for _ in Path(f"/proc/{pid}/{what}").iterdir())


def tree(pid: int) -> list[int]:
    """`pid` and its descendants, parents first."""
    found = [pid]
    for process in found:
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):
            for task in Path(f"/proc/{process}/task").iterdir():
                with contextlib.suppress(FileNotFoundError, ProcessLookupError):
                    found += map(int, (task / "children").read_text().split())
    return found


def slope(times: Sequence[float], values: Sequence[float]) -> float:
    """Units of `values` per unit of `times`, by least squares: slope([0, 1, 2], [5, 7, 9]) == 2. 0 of a single one."""
    mean_time, mean_value = sum(times) / len(times), sum(values) / len(values)
    square = sum((t - mean_time) ** 2 for t in times)
    if not square:
        return 0.0
    return sum((t - mean_time) * (v - mean_value) for t, v in zip(times, values, strict=True)) / square
