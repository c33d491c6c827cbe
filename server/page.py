"""One HTML file that needs no network: a template of `static/`, the plotting library and numbers. Knows no numbers."""

from __future__ import annotations

import html
import re
from pathlib import Path

import msgspec

_STATIC = Path(__file__).parent / "static"
_MARK = re.compile(r"__(TITLE|STYLE|ECHARTS|PLOTS|DATA)__")


def fill(template: str, title: str, data: object) -> str:
    """The page; `data` becomes JSON in it."""
    parts = {
        "TITLE": html.escape(title),
        "STYLE": _text("page.css"),
        "ECHARTS": _text("echarts.min.js"),
        "PLOTS": _text("plots.js"),
        "DATA": _json_in_script(data),
    }
    return _MARK.sub(lambda match: parts[match[1]], _text(template))  # once over: what is put in is not searched


def _text(name: str) -> str:
    return (_STATIC / name).read_text(encoding="utf-8")


def _json_in_script(data: object) -> str:
    """JSON that cannot end the element it stands in: a name with `</script>` or `<!--` in it stays a name."""
    return msgspec.json.encode(data).decode().replace("<", "\\u003c")
