"""How torch's threads wait for one another. To be called before torch is imported."""

from __future__ import annotations

import os


def wait_passively() -> None:
    """Let torch's OpenMP threads sleep at their barriers instead of spinning, unless the user chose otherwise.

    A step is thousands of small parallel regions. Where anything else runs on a core, a spinning thread holds the
    core that the thread it waits for needs: 24 tokens of the demo model then take 4 minutes instead of 3 seconds.
    """
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
