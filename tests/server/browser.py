"""Debian's Chromium by Playwright, and pages that watch themselves: no error in the console, nothing from elsewhere.

A module that uses these has no asynchronous tests: Playwright keeps a loop of its own in this thread.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from playwright.sync_api import Browser, Page, sync_playwright

CHROMIUM = Path("/usr/bin/chromium")
LAPTOP = {"viewport": {"width": 1366, "height": 768}}
PHONE = {"viewport": {"width": 360, "height": 740}, "device_scale_factor": 2, "is_mobile": True, "has_touch": True}
SCREENS: dict[str, dict[str, Any]] = {
    "laptop, light": {**LAPTOP, "color_scheme": "light"},
    "laptop, dark": {**LAPTOP, "color_scheme": "dark"},
    "phone, light": {**PHONE, "color_scheme": "light"},
    "phone, dark": {**PHONE, "color_scheme": "dark"},
}

OpenPage = Callable[..., Page]


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    if not CHROMIUM.exists():
        pytest.fail("tests of the pages need a browser: apt-get install chromium (.ci/run does)")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=str(CHROMIUM), args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def open_page(browser: Browser) -> Iterator[OpenPage]:
    """`open_page(url, may_fail="401", **context)` -> a page; `may_fail` is what its console may tell of."""
    with _pages(browser) as open_one:
        yield open_one


@contextmanager
def _pages(browser: Browser) -> Iterator[OpenPage]:
    contexts, problems = [], []

    def open_one(url: str, *, may_fail: str = "", **settings: Any) -> Page:
        context = browser.new_context(**{**LAPTOP, **settings})
        contexts.append(context)
        context.set_default_timeout(10_000)
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


def overflow(page: Page) -> int:
    """Pixels that the page is wider than its window."""
    wider: int = page.evaluate("document.documentElement.scrollWidth - document.documentElement.clientWidth")
    return max(0, wider)


def background(page: Page) -> tuple[int, ...]:
    colour = page.evaluate("getComputedStyle(document.body).backgroundColor")
    return tuple(int(part) for part in re.findall(r"\d+", colour))[:3]
