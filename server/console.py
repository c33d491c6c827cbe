"""The console script. Ctrl-C is quiet even while the command line is still being imported."""

from __future__ import annotations

import sys


def main() -> None:
    """Run the command line; exit code 130 for a keyboard interrupt, as shells have it."""
    try:
        from server.cli import main as run

        run()
    except KeyboardInterrupt:
        sys.exit(130)
