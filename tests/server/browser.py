"""Debian's Chromium by Playwright, and pages that watch themselves: no error in the console, nothing from elsewhere.

A module that uses these has no asynchronous tests: Playwright keeps a loop of its own in this thread.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import pytest
from playwright.sync_api import Browser, Page, expect, sync_playwright

from server.engine_face import StartableEngine
from tests.server.live_server import LiveServer

CHROMIUM = Path("/usr/bin/chromium")
LAPTOP = {"viewport": {"width": 1366, "height": 768}}
PHONE = {"viewport": {"width": 360, "height": 740}, "device_scale_factor": 2, "is_mobile": True, "has_touch": True}
SCREENS: dict[str, dict[str, Any]] = {"laptop": LAPTOP, "phone": PHONE}

OpenPage = Callable[..., Page]
Start = Callable[..., LiveServer]


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    if not CHROMIUM.exists():
        pytest.fail("tests of the pages need a browser: apt-get install chromium (.ci/run does)")
    with sync_playwright() as playwright:
        expect.set_options(timeout=20_000)
        browser = playwright.chromium.launch(executable_path=str(CHROMIUM), args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def start() -> Iterator[Start]:
    """`start(engine, **settings)` -> a server that ends after the pages: none of them shall miss it."""
    servers: list[LiveServer] = []

    def start_one(engine: StartableEngine, **settings: Any) -> LiveServer:
        servers.append(LiveServer(engine, **settings))
        return servers[-1]

    yield start_one
    for server in servers:
        server.stop()


@pytest.fixture
def open_page(browser: Browser, start: Start) -> Iterator[OpenPage]:
    """`open_page(url, may_fail="401", **context)` -> a page; `may_fail` is what its console may tell of."""
    with _pages(browser) as open_one:
        yield open_one


@contextmanager
def _pages(browser: Browser) -> Iterator[OpenPage]:
    contexts, problems = [], []

    def open_one(url: str, *, may_fail: str = "", **settings: Any) -> Page:
        context = browser.new_context(**{**LAPTOP, **settings})
        contexts.append(context)
        context.set_default_timeout(20_000)
        page = context.new_page()
        origin = re.match(r"https?://[^/]+", url)
        assert origin is not None

        def hears(kind: str, text: str) -> None:
            if kind in ("error", "warning") and not (may_fail and re.search(may_fail, text)):
                problems.append(f"console {kind}: {text}")

        def asks(asked: str) -> None:
            if not asked.startswith((f"{origin[0]}/", "data:", "blob:")):
                problems.append(f"asked {asked}")

        context.on("request", lambda request: asks(request.url))
        page.on("console", lambda message: hears(message.type, message.text))
        page.on("pageerror", lambda error: problems.append(f"uncaught: {error}"))
        page.goto(url)
        return page

    yield open_one
    for context in contexts:
        context.close()
    if problems:
        pytest.fail("\n".join(problems))


def give_keys(page: Page, wrong: str, right: str) -> None:
    """Both, one after the other, in the dialog that asks for one."""
    dialog = page.get_by_role("dialog", name="API key")
    expect(dialog).to_contain_text("wants an API key")
    page.fill("#key", wrong)
    page.keyboard.press("Enter")
    expect(dialog.get_by_role("alert")).to_contain_text("not accepted")
    page.fill("#key", right)
    page.keyboard.press("Enter")


def overflow(page: Page) -> int:
    """Pixels that the page is wider than its window."""
    wider: int = page.evaluate("document.documentElement.scrollWidth - document.documentElement.clientWidth")
    return max(0, wider)


def contrast(page: Page, scheme: Literal["light", "dark"]) -> float:
    """Of text against the page, by WCAG's formula, when the user prefers that scheme; negative: text is the lighter."""
    page.emulate_media(color_scheme=scheme)
    style = page.evaluate("[getComputedStyle(document.body).color, getComputedStyle(document.body).backgroundColor]")
    text, back = (_luminance([int(part) for part in re.findall(r"\d+", colour)[:3]]) for colour in style)
    return (back + 0.05) / (text + 0.05) if back > text else -(text + 0.05) / (back + 0.05)


def _luminance(rgb: list[int]) -> float:
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in (part / 255 for part in rgb)]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]
