"""An analysed workload as one HTML file that needs no network. Knows the template, not what is plotted from what."""

from __future__ import annotations

import html
import re
from pathlib import Path

import msgspec

from server.analysis_text import Analysis, replayed

_STATIC = Path(__file__).parent / "static"
_MARK = re.compile(r"__(TITLE|ECHARTS|DATA)__")


def page(of: Analysis) -> str:
    """The page, with the plotting library and the numbers in it."""
    data = {"analysis": msgspec.to_builtins(of), "replayed": replayed(of.workload)}
    parts = {
        "TITLE": html.escape(of.trace),
        "ECHARTS": (_STATIC / "echarts.min.js").read_text(encoding="utf-8"),
        "DATA": _json_in_script(data),
    }
    template = (_STATIC / "analysis.html").read_text(encoding="utf-8")
    return _MARK.sub(lambda match: parts[match[1]], template)  # once over: what is put in is not searched


def _json_in_script(data: object) -> str:
    """JSON that cannot end the element it stands in: a name with `</script>` or `<!--` in it stays a name."""
    return msgspec.json.encode(data).decode().replace("<", "\\u003c")
