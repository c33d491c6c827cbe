"""The page at /docs in a real browser."""

from __future__ import annotations

import re

from playwright.sync_api import Page, expect

from server.auth import hash_key
from tests.server.browser import OpenPage, Start, browser, give_keys, open_page, start
from tests.server.fake_engine import FakeEngine

__all__ = ["browser", "open_page", "start"]


def ask_for_models(page: Page) -> None:
    operation = page.locator(".opblock").filter(has=page.locator('[data-path="/v1/models"]'))
    if operation.get_by_role("button", name="Execute").count() == 0:
        operation.locator(".opblock-summary-control").click()
    operation.get_by_role("button", name="Execute").click()


def test_every_route_is_shown(start: Start, open_page: OpenPage) -> None:
    page = open_page(f"{start(FakeEngine()).url}/docs")
    expect(page.locator(".info .title")).to_contain_text("Foregate")
    expect(page.locator('[data-path="/v1/chat/completions"]')).to_be_visible()
    expect(page.get_by_role("button", name="Authorize")).to_have_count(0)


def test_the_key_is_asked_for_and_can_be_changed_under_authorize(start: Start, open_page: OpenPage) -> None:
    server = start(FakeEngine(), api_key_hashes=(hash_key("right"),))
    page = open_page(f"{server.url}/docs", may_fail="401")
    give_keys(page, "wrong", "right")
    expect(page.locator(".info .title")).to_contain_text("Foregate")
    status = page.locator(".live-responses-table tbody .response-col_status").first
    ask_for_models(page)
    expect(status).to_have_text(re.compile("200"))
    expect(page.locator(".live-responses-table")).to_contain_text('"fake"')

    page.locator(".auth-wrapper .authorize").click()
    authorize = page.locator(".dialog-ux")
    expect(authorize).to_contain_text("http, Bearer")
    authorize.get_by_text("Logout", exact=True).click()
    authorize.locator("input").fill("another")
    authorize.get_by_text("Authorize", exact=True).click()
    authorize.get_by_text("Close", exact=True).click()
    ask_for_models(page)
    expect(status).to_have_text(re.compile("401"))

    page.goto(f"{server.url}/")  # the other pages have the same key
    expect(page.locator("#model")).to_have_text("fake")
