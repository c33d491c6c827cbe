"""The page at / in a real browser."""

from __future__ import annotations

import re

import msgspec
import pytest
from playwright.sync_api import Page, expect

from engine.errors import EngineOverloaded, InvalidRequest
from server.auth import hash_key
from tests.server.browser import SCREENS, OpenPage, Start, browser, contrast, give_keys, open_page, overflow, start
from tests.server.fake_engine import FakeEngine, Script, Token
from tests.server.live_server import LiveServer

__all__ = ["browser", "open_page", "start"]

MARKDOWN = """Some **bold** and `a < b` text.

1. first
   - inner *one*
2. second

```html
<b>not bold</b>
```
<img src=x onerror="document.title='owned'"><script>document.title='owned'</script>
[link](javascript:alert(1))"""


def in_pieces(text: str, delay_s: float = 0.0) -> list[Token]:
    return [Token(piece, delay_s=delay_s) for piece in re.findall(r"\s*\S+\s*?", text)]


@pytest.fixture
def live(start: Start) -> LiveServer:
    engine = FakeEngine()
    engine.model = msgspec.structs.replace(engine.model, max_model_len=4096)
    return start(engine)


@pytest.fixture
def engine(live: LiveServer) -> FakeEngine:
    assert isinstance(live.engine, FakeEngine)
    return live.engine


@pytest.fixture
def chat(live: LiveServer, open_page: OpenPage) -> Page:
    page = open_page(f"{live.url}/")
    expect(page.locator("#model")).to_have_text("fake")
    return page


def say(page: Page, text: str) -> None:
    page.fill("#prompt", text)
    page.press("#prompt", "Enter")


def test_an_answer_is_written_as_it_comes_with_its_figures(chat: Page, engine: FakeEngine) -> None:
    engine.script = Script([Token("Paris "), Token("is "), Token("it", delay_s=1.0), Token(".")])
    say(chat, "Which?")
    answer = chat.locator("article.assistant .answer")
    expect(answer).to_have_text("Paris is")
    expect(chat.locator("#stop")).to_be_visible()
    expect(answer).to_have_text("Paris is it.")
    figures = chat.locator(".figures-line")
    expect(figures).to_have_text(re.compile(r"^first token after \d+\.\d+ s, \d+\.\d tokens/s, 4 tokens$"))
    expect(chat.locator("#send")).to_be_visible()
    assert engine.messages == [{"role": "user", "content": "Which?"}]


def test_shift_enter_begins_a_line_and_enter_sends_both(chat: Page, engine: FakeEngine) -> None:
    chat.focus("#prompt")
    chat.keyboard.type("one")
    chat.keyboard.press("Shift+Enter")
    chat.keyboard.type("two")
    chat.keyboard.press("Enter")
    expect(chat.locator(".figures-line")).to_be_visible()
    assert engine.messages[-1]["content"] == "one\ntwo"


def test_stop_keeps_what_was_written_and_ends_the_request(chat: Page, engine: FakeEngine) -> None:
    engine.script = Script([Token("Once "), Token("upon"), Token(" never", delay_s=60.0)])
    say(chat, "A story")
    expect(chat.locator(".answer")).to_have_text("Once upon")
    chat.click("#stop")
    expect(chat.locator(".figures-line")).to_have_text(re.compile(r"about 2 tokens, stopped$"))
    for _ in range(100):
        if engine.num_aborted:
            break
        chat.wait_for_timeout(50)
    assert (engine.num_aborted, engine.num_open) == (1, 0)
    engine.script = Script([Token("again")])
    chat.click("text=Try again")
    expect(chat.locator(".answer")).to_have_text("again")
    assert [message["role"] for message in engine.messages] == ["user"]


def test_what_a_model_writes_never_becomes_html(chat: Page, engine: FakeEngine) -> None:
    engine.script = Script(in_pieces(MARKDOWN))
    say(chat, "<i>mine</i>")
    expect(chat.locator(".figures-line")).to_be_visible()
    answer = chat.locator(".answer")
    assert answer.locator("img, script, b, a").count() == chat.locator("article.user i").count() == 0
    assert chat.title() == "Foregate"
    expect(answer).to_contain_text("<img src=x onerror=")
    expect(answer.locator("strong")).to_have_text("bold")
    expect(answer.locator("p code")).to_have_text("a < b")
    expect(answer.locator("pre")).to_have_text("<b>not bold</b>")
    expect(answer.locator("ol > li")).to_have_count(2)
    expect(answer.locator("ol > li > ul > li em")).to_have_text("one")


def test_code_and_answers_can_be_copied(live: LiveServer, engine: FakeEngine, open_page: OpenPage) -> None:
    engine.script = Script([Token("Run\n```sh\n"), Token("make serve\n```")])
    page = open_page(f"{live.url}/", permissions=["clipboard-read", "clipboard-write"])
    say(page, "How?")
    page.click(".copy-code")
    expect(page.locator(".copy-code")).to_have_text("Copied")
    assert page.evaluate("navigator.clipboard.readText()") == "make serve"
    page.click(".copy")
    expect(page.locator(".copy")).to_have_text("Copied")
    assert page.evaluate("navigator.clipboard.readText()") == "Run\n```sh\nmake serve\n```"


def test_while_the_model_loads_a_message_waits_and_is_then_sent(start: Start, open_page: OpenPage) -> None:
    engine = FakeEngine()
    engine.start_s = 60.0
    server = start(engine)
    page = open_page(f"{server.url}/", may_fail="503")
    expect(page.locator("#status")).to_contain_text("still loading")
    say(page, "Hello?")
    expect(page.locator("#status")).to_contain_text("still loading. Your message is sent again in")
    engine.state = "ready"
    expect(page.locator(".answer")).to_have_text("Paris.")
    expect(page.locator("#status")).to_be_empty()


def test_a_full_server_is_asked_again(live: LiveServer, engine: FakeEngine, open_page: OpenPage) -> None:
    scripts = [Script(refusal=EngineOverloaded("the queue is full")), Script()]
    engine.script = lambda prompt: scripts.pop(0)
    page = open_page(f"{live.url}/", may_fail="503")
    say(page, "Hello?")
    expect(page.locator("#status")).to_contain_text("The server is busy. Your message is sent again in")
    expect(page.locator(".answer")).to_have_text("Paris.")


@pytest.mark.parametrize(
    ("script", "shown"),
    [
        (Script(refusal=InvalidRequest("the prompt is not to our taste")), "The prompt is not to our taste."),
        (Script([Token("Half ")], failure=RuntimeError("boom")), re.compile("Half.*Internal server error")),
        (Script(refusal=InvalidRequest("too long", code="context_length_exceeded")), re.compile("Begin a new conv")),
    ],
    ids=["refused", "broken off", "too long"],
)
def test_an_error_is_shown_and_one_can_try_again(
    live: LiveServer, engine: FakeEngine, open_page: OpenPage, script: Script, shown: str | re.Pattern[str]
) -> None:
    page = open_page(f"{live.url}/", may_fail="400|500")
    engine.script = script
    say(page, "Hello?")
    expect(page.locator("article.assistant .body")).to_contain_text(shown)
    engine.script = Script()
    page.click("text=Try again")
    expect(page.locator(".answer")).to_have_text("Paris.")
    expect(page.locator(".error")).to_have_count(0)


def test_a_server_that_is_gone_is_named(live: LiveServer, open_page: OpenPage) -> None:
    page = open_page(f"{live.url}/", may_fail="ERR_CONNECTION_REFUSED")
    expect(page.locator("#model")).to_have_text("fake")
    live.stop()
    say(page, "Hello?")
    expect(page.locator(".error")).to_contain_text("Cannot reach the server")


def test_a_key_is_asked_for_and_kept_for_the_tab_alone(start: Start, open_page: OpenPage) -> None:
    server = start(FakeEngine(), api_key_hashes=(hash_key("right"),))
    page = open_page(f"{server.url}/", may_fail="401")
    give_keys(page, "wrong", "right")
    expect(page.locator("#model")).to_have_text("fake")
    say(page, "Hello?")
    expect(page.locator(".answer")).to_have_text("Paris.")
    page.reload()
    expect(page.locator("#model")).to_have_text("fake")
    page.goto(f"{server.url}/dashboard")
    expect(page.locator("#state")).to_have_text("ready")
    assert page.evaluate("[localStorage.length, document.cookie]") == [0, ""]
    assert page.evaluate("sessionStorage.getItem('foregate.key')") == "right"


def test_settings_are_sent_and_the_conversation_outlives_a_reload(chat: Page, engine: FakeEngine) -> None:
    chat.click("#settings summary")
    chat.fill("#system", "Be brief.")
    chat.fill("#temperature", "0")
    chat.fill("#max-tokens", "7")
    say(chat, "One?")
    expect(chat.locator(".figures-line")).to_be_visible()
    chat.reload()
    expect(chat.locator(".answer")).to_have_text("Paris.")
    say(chat, "Two?")
    expect(chat.locator(".figures-line")).to_have_count(2)
    told = [(message["role"], message["content"]) for message in engine.messages]
    assert told == [("system", "Be brief."), ("user", "One?"), ("assistant", "Paris."), ("user", "Two?")]
    params = engine.seen[-1][2]
    assert (params.temperature, params.max_tokens) == (0.0, 7)
    chat.click("#new")
    expect(chat.locator("article")).to_have_count(0)
    expect(chat.locator("#empty")).to_be_visible()
    chat.reload()
    expect(chat.locator("article")).to_have_count(0)


@pytest.mark.parametrize("screen", SCREENS)
def test_the_page_fits_its_screen_in_light_and_dark(
    live: LiveServer, engine: FakeEngine, open_page: OpenPage, screen: str
) -> None:
    engine.script = Script([Token("```\n" + 300 * "x" + "\n```\n"), Token("y" * 300), Token("\n\n- z")])
    page = open_page(f"{live.url}/", reduced_motion="reduce", **SCREENS[screen])
    say(page, "w" * 200)
    expect(page.locator(".figures-line")).to_be_visible()
    assert overflow(page) == 0
    assert contrast(page, "light") > 7
    assert contrast(page, "dark") < -7
    box = page.locator("#prompt").bounding_box()
    assert box is not None
    assert box["y"] + box["height"] <= SCREENS[screen]["viewport"]["height"]  # one can always write
