"""An analysed workload as one HTML file. Knows the template, not what is plotted from what."""

from __future__ import annotations

import msgspec

from server.analysis_text import Analysis, replayed
from server.page import fill


def page(of: Analysis) -> str:
    """The page, with the plotting library and the numbers in it."""
    data = {"analysis": msgspec.to_builtins(of), "replayed": replayed(of.workload)}
    return fill("analysis.html", of.trace, data)
