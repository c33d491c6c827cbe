"""What of the host's memory may be taken."""

from __future__ import annotations

from pathlib import Path


def free_memory_nbytes() -> int:
    """Memory that can be taken without swapping, as the system estimates it, within a cgroup's limit if any."""
    available = 0
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("MemAvailable:"):
            available = int(line.split()[1]) * 1024
    limit, used = Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory.current")
    if limit.exists() and used.exists() and (text := limit.read_text().strip()) != "max":
        available = min(available, max(0, int(text) - int(used.read_text())))
    return available
