"""The page at /dashboard in a real browser: on a small real engine under load, and on a scripted one."""

from __future__ import annotations

import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import msgspec
import numpy as np
import pytest
from playwright.sync_api import Page, expect

from cache.expert_table import ExpertTable
from cache.stats import CacheStats, PhaseStats
from engine.async_engine import AsyncEngine
from engine.config import CacheConfig, EngineConfig
from engine.messages import EngineStats
from kernels.quant.formats import FORMATS
from server.auth import hash_key
from tests.engine.tiny_models import make_checkpoint
from tests.server.browser import SCREENS, OpenPage, Start, browser, contrast, open_page, overflow, start
from tests.server.fake_engine import FakeEngine, Script, Token
from tests.server.live_server import LiveServer

__all__ = ["browser", "open_page", "start"]


@pytest.fixture(scope="module")
def tiny_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LiveServer]:
    """A random model with two layers of 8 experts, of which 10 fit."""
    directory = tmp_path_factory.mktemp("olmoe")
    make_checkpoint(directory, "olmoe")
    record = FORMATS["float32"].layout(64, 32).nbytes
    config = EngineConfig(
        model=directory,
        max_model_len=256,
        kv_memory_nbytes=16 * 2**20,
        cache=CacheConfig(format="float32", memory_nbytes=10 * record),
    )
    server = LiveServer(AsyncEngine(config), served_names=("tiny",))
    with httpx.Client(base_url=server.url, trust_env=False) as client:
        for _ in range(300):
            if client.get("/health").status_code == 200:
                break
            threading.Event().wait(0.1)
    yield server
    server.stop()


@contextmanager
def under_load(url: str) -> Iterator[None]:
    """Two clients, one request after another."""
    done = threading.Event()

    def ask_on(number: int) -> None:
        body = {"prompt": [5 + number] * 40, "max_tokens": 100, "ignore_eos": True, "stream": number == 0}
        with httpx.Client(base_url=url, trust_env=False, timeout=30) as client:
            while not done.is_set():
                client.post("/v1/completions", json=body, headers={"x-request-id": f"load-{number}"})

    clients = [threading.Thread(target=ask_on, args=(number,)) for number in range(2)]
    for client in clients:
        client.start()
    try:
        yield
    finally:
        done.set()
        for client in clients:
            client.join()


def number_of(page: Page, card: str, which: int = 0) -> float:
    text = page.get_by_role("region", name=card).locator("dd").nth(which).inner_text()
    found = re.match(r"[\d.,]+", text)
    return float(found[0].replace(",", "")) if found else -1.0


def working_engine() -> FakeEngine:
    """It has done something, with more experts than fit across a phone."""
    engine = FakeEngine()
    engine.stats_to_tell = EngineStats(
        state="ready",
        kv_blocks=10,
        kv_blocks_used=5,
        expert_cache=CacheStats(num_slots=4, num_slots_used=4, slot_nbytes=4096, decode=PhaseStats(queries=9, hits=7)),
    )
    layers, num_experts = 6, 128
    rng = np.random.default_rng(0)
    queries = rng.integers(1, 1000, layers * num_experts)
    engine.table = ExpertTable(
        layers=list(range(layers)),
        num_experts=num_experts,
        half_life_s=10.0,
        queries=queries.astype("<u8").tobytes(),
        hits=(queries // 2).astype("<u8").tobytes(),
        recent=(queries / 10).astype("<f4").tobytes(),
        residency=bytes((queries % 3).astype("u1")),
    )
    return engine


@pytest.fixture
def live(start: Start) -> LiveServer:
    return start(working_engine())


def test_it_shows_a_working_engine_live(tiny_server: LiveServer, open_page: OpenPage) -> None:
    page = open_page(f"{tiny_server.url}/dashboard")
    expect(page.locator("h1")).to_have_text("tiny")
    expect(page.locator("#state")).to_have_text("ready")
    expect(page.locator("#about")).to_contain_text("room for 10 of 16 experts")
    expect(page.locator("#requests")).to_contain_text("None yet.")
    assert number_of(page, "Requests") == 0
    with under_load(tiny_server.url):
        rows = page.locator("#requests tr")
        expect(rows.filter(has_text="answering").first).to_be_visible()
        expect(rows.filter(has_text="length").first).to_be_visible()
        expect(rows.filter(has_text="load-0").first).to_contain_text("/v1/completions, stream")
        cells = rows.filter(has_text="length").first.locator("td").all_inner_texts()
        assert cells[3:5] == ["40", "100"]
        expect(page.locator("#cards dd").first).to_have_text(re.compile(r"^[\d.,]*[1-9]"))  # a wait by eval is refused
        assert number_of(page, "Generated tokens/s") > 0
        assert number_of(page, "Requests") > 0
        assert number_of(page, "KV memory in use") > 0
        assert 0 < number_of(page, "Expert hit rate") < 100
        assert number_of(page, "Waiting for experts") >= 0
        assert number_of(page, "Expert loads") > 0
        heat = page.locator("#heat canvas")
        expect(heat).to_have_attribute("aria-label", re.compile("Experts by layer: 10 of 16 in expert memory"))
        heat.focus()
        page.keyboard.press("ArrowRight")
        page.keyboard.press("ArrowRight")
        told = page.locator("#readout")
        expect(told).to_have_text(re.compile(r"Layer 0, expert 1: [\d.]+ uses/s lately, [\d,]+ uses since .* now .*\."))
        before = told.inner_text()
        expect(told).not_to_have_text(before)  # it goes on counting
    expect(page.locator("#requests tr.running")).to_have_count(0)
    page.reload()
    expect(page.locator("#requests tr").nth(1)).to_be_visible()
    assert page.evaluate("document.querySelector('.small-plot canvas') !== null")


def test_it_says_when_the_server_is_gone_and_goes_on_with_the_next_which_may_have_no_experts(
    live: LiveServer, start: Start, open_page: OpenPage
) -> None:
    page = open_page(f"{live.url}/dashboard", may_fail="ERR_CONNECTION|ERR_EMPTY|ERR_SOCKET")
    expect(page.locator("#state")).to_have_text("ready")
    expect(page.locator("#experts")).to_be_visible()
    live.stop()
    trouble = page.locator("#trouble")
    expect(trouble).to_contain_text("Cannot reach the server. Trying again every second.")
    expect(trouble).to_contain_text(re.compile(r"is \d+(\.\d+)? s old"))
    expect(page.locator("#state")).to_have_text("unreachable")
    start(FakeEngine(), port=live.port, served_names=("successor",))
    expect(page.locator("h1")).to_have_text("successor")
    expect(trouble).to_be_hidden()
    expect(page.locator("#state")).to_have_text("ready")
    expect(page.get_by_role("region", name="Generated tokens/s")).to_be_visible()
    expect(page.get_by_role("region", name="Expert hit rate")).to_have_count(0)
    expect(page.locator("#experts")).to_be_hidden()
    expect(page.locator("#latest")).to_be_visible()


def test_a_key_is_asked_for_before_anything_is_shown_and_then_one_can_choose_what_the_colour_shows(
    start: Start, open_page: OpenPage
) -> None:
    server = start(working_engine(), api_key_hashes=(hash_key("right"),))
    page = open_page(f"{server.url}/dashboard", may_fail="401")
    expect(page.get_by_role("dialog", name="API key")).to_be_visible()
    assert page.locator("#requests tr").count() == 0
    page.fill("#key", "right")
    page.keyboard.press("Enter")
    expect(page.locator("#state")).to_have_text("ready")
    expect(page.locator("#legend")).to_contain_text("uses/s")
    pixels = "document.querySelector('#heat canvas').toDataURL()"
    first = page.evaluate(pixels)
    missed = page.get_by_role("button", name="Missed")
    missed.click()
    expect(missed).to_have_attribute("aria-pressed", "true")
    expect(page.locator("#legend")).to_contain_text("misses")
    assert page.evaluate(pixels) != first


def test_a_hidden_tab_asks_for_nothing_and_then_tells_what_became_of_the_engine(
    live: LiveServer, open_page: OpenPage
) -> None:
    assert isinstance(live.engine, FakeEngine)
    page = open_page(f"{live.url}/dashboard")
    expect(page.locator("#state")).to_have_text("ready")
    hide = "([hidden]) => { Object.defineProperty(document, 'hidden', { value: hidden, configurable: true }); "
    hide += "document.dispatchEvent(new Event('visibilitychange')); }"
    page.evaluate(hide, [True])
    page.wait_for_timeout(300)  # for what was under way
    asked: list[str] = []
    page.on("request", lambda request: asked.append(request.url))
    before, live.engine.stats_to_tell = live.engine.stats_to_tell, EngineStats(state="restarting")
    live.engine.state = "restarting"
    page.wait_for_timeout(2200)
    assert asked == []
    page.evaluate(hide, [False])
    expect(page.locator("#state")).to_have_text("restarting")
    expect(page.get_by_role("region", name="Expert hit rate")).to_be_visible()
    live.engine.stats_to_tell = msgspec.structs.replace(before, error="RuntimeError: boom")
    live.engine.state = "dead"
    expect(page.locator("#trouble")).to_contain_text("The engine has stopped: RuntimeError: boom")


# the long and the short names of columns: only what a screen shows is as wide as it is
WIDEST_ROW_OVERFLOW = """() => {
  const row = document.querySelector("#requests tr"), shown = [...row.cells].filter((cell) => cell.offsetWidth);
  row.classList.add("running");
  ["44 min", "16,384", "16,384", "99 ms", "64.1", "answering"].forEach((text, i) => {
    shown.at(i - 6).textContent = text;
  });
  const table = row.closest("table"), section = table.closest("section"), style = getComputedStyle(section);
  const inner = section.getBoundingClientRect().right - parseFloat(style.paddingRight);
  return Math.floor(table.getBoundingClientRect().right - inner);
}"""


@pytest.mark.parametrize("screen", SCREENS)
def test_the_page_fits_its_screen_in_light_and_dark(live: LiveServer, open_page: OpenPage, screen: str) -> None:
    assert isinstance(live.engine, FakeEngine)
    live.engine.script = Script([Token("a"), Token("b")])
    with httpx.Client(base_url=live.url, trust_env=False) as client:
        client.post("/v1/completions", json={"prompt": "hi"}, headers={"x-request-id": "w" * 128})
    page = open_page(f"{live.url}/dashboard", reduced_motion="reduce", **SCREENS[screen])
    expect(page.locator("#requests tr.running, #requests tr td").first).to_be_visible()
    expect(page.locator("#experts")).to_be_visible()
    assert overflow(page) == 0
    assert page.evaluate(WIDEST_ROW_OVERFLOW) <= 0
    assert contrast(page, "light") > 7
    assert contrast(page, "dark") < -7
    # 128 experts are too many beside one another on a phone: they go down
    note = page.locator("#experts-note")
    expect(note).to_contain_text("One column is a layer" if screen == "phone" else "One row is a layer")


def test_everything_the_page_loads_comes_from_the_package(live: LiveServer) -> None:
    """So that none is forgotten in the list of what needs no key, nor in the wheel."""
    from server.routes.pages import PAGE_PATHS

    static = Path(__file__).parents[2] / "server" / "static"
    for name in ("chat.html", "dashboard.html", "chat.js", "dashboard.js", "heatmap.js", "markdown.js", "session.js"):
        text = (static / name).read_text()
        for found in re.findall(r'(?:src|href)="(static/[^"]+)"', text) + re.findall(r'from "\./([^"]+)"', text):
            assert f"/static/{found.removeprefix('static/')}" in PAGE_PATHS
