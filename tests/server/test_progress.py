"""server/progress.py."""

from __future__ import annotations

import io

from rich.console import Console

from server.progress import ProgressDisplay


def test_without_a_terminal_there_is_a_line_for_each_tenth() -> None:
    out = io.StringIO()
    with ProgressDisplay(Console(file=out, force_terminal=False)) as display:
        for done in range(101):
            display("pack [int8]", done, 100)
        display("read", 1, 1)
    lines = out.getvalue().splitlines()
    assert lines[:2] == ["pack [int8]: 0/100", "pack [int8]: 10/100"]
    assert len(lines) == 12
    assert lines[-1] == "read: 1/1"


def test_with_a_terminal_there_is_a_bar_for_each_kind_of_work() -> None:
    out = io.StringIO()
    with ProgressDisplay(Console(file=out, force_terminal=True, width=100, legacy_windows=False)) as display:
        display("pack [int8]", 50, 100)
        display("pack [int8]", 100, 100)
        display("read", 0, 0)
    assert "pack [int8]" in out.getvalue()
    assert "100/100" in out.getvalue()
