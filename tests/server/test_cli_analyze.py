"""server/cli_analyze.py: what `foregate analyze` tells, as text, as JSON and as a page."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cache.trace import RoutingTrace, load_all
from cache.workload import Judgement, Size, Workload
from server.analysis_page import page
from server.analysis_text import Analysis, advice, text
from tests.cache.synthetic_traces import REAL_TRACES, local_trace, random_trace, trace_of

STATIC = Path(__file__).parents[2] / "server" / "static"
NASTY = "</script><script>alert(1)</script>__DATA__<!--"


@pytest.fixture(scope="module")
def trace() -> RoutingTrace:
    return replace(local_trace(0, [20] * 6), domains=("code", "code", "code", "prose", "prose", "prose"))


@pytest.fixture
def file(tmp_path: Path, trace: RoutingTrace) -> str:
    trace.save(tmp_path / "local.npz")
    return str(tmp_path / "local.npz")


def test_the_text_tells_every_measure_and_ends_with_the_advice(foregate: Any, file: str) -> None:
    result = foregate("analyze", file, "--cache", "25%,50%", "--expert-size", "1MiB")
    assert result.code == 0
    told = result.out
    assert told.startswith("local.npz: 6 requests, 120 tokens, 2 domains; 6 layers, 2 of 16 experts a token: 12 of 96")
    for part in ("SRP", "SCH", "reuse distance", "popularity", "working set", "overlap", "unique experts", "hit rate"):
        assert part in told
    assert re.search(r"^  50% +48 +4x +48\.0MiB +\d", told, re.MULTILINE)
    assert re.search(r"^  prose +3 +20 +12 ", told, re.MULTILINE)
    assert "all 120 tokens replayed, one request at a time" in told
    assert re.match(r"A cache of .*MiB.* hits \d+%.*\.$", told.splitlines()[-1])


def test_json_is_one_object_with_the_same_numbers(foregate: Any, file: str) -> None:
    args = ("analyze", file, "--cache", "24", "--window", "4", "--ratios", "2,1", "--replay-tokens", "50", "--json")
    done = json.loads(foregate(*args).out)
    workload = done["workload"]
    assert (done["trace"], done["expert_nbytes"]) == ("local.npz", None)
    assert (workload["window"], [sch["ratio"] for sch in workload["sch"]]) == (4, [2.0, 1.0])
    assert (workload["replayed_requests"], workload["replayed_tokens"]) == (2, 40)
    assert [size["num_slots"] for size in workload["curve"]] == [24, 96]
    assert np.asarray([layer["popularity"] for layer in workload["layers"]]).shape == (6, 16)
    assert workload["overlap"]["domains"] == ["code", "prose"]
    assert done["advice"].endswith(".")


def test_a_page_is_written_that_loads_nothing(foregate: Any, file: str, tmp_path: Path) -> None:
    html = tmp_path / "page.html"
    assert foregate("analyze", file, "--cache", "25%", "--html", str(html)).code == 0
    written = html.read_text(encoding="utf-8")
    assert "<title>local.npz - foregate analyze</title>" in written
    own = written.replace((STATIC / "echarts.min.js").read_text(encoding="utf-8"), "")
    assert len(own) < len(written) - 500_000  # it is in the page
    assert "http" not in own.replace("http-equiv", "")
    assert not re.search(r"(src|href)\s*=|@import|url\(|fetch\(", own)
    assert "default-src 'none'" in own


def data_of(written: str) -> Any:
    return json.loads(re.findall(r'<script type="application/json" id="data">(.*?)</script>', written, re.DOTALL)[0])


def test_a_name_cannot_break_out_of_the_page_or_the_terminal(foregate: Any, tmp_path: Path) -> None:
    trace = replace(local_trace(0, [20] * 4), domains=(NASTY, NASTY, "\x1b[31mred", "\x1b[31mred"))
    path, html = tmp_path / "<b>&__ECHARTS__.npz", tmp_path / "page.html"
    trace.save(path)
    result = foregate("analyze", str(path), "--cache", "25%", "--html", str(html))
    assert "\x1b" not in result.out
    written = html.read_text(encoding="utf-8")
    assert NASTY not in written
    assert "<title>&lt;b&gt;&amp;__ECHARTS__.npz" in written
    assert written.count("</script>") == 4 == written.count("<script")
    data = data_of(written)
    assert data["analysis"]["workload"]["overlap"]["domains"] == [NASTY, "\x1b[31mred"]
    assert data["analysis"]["trace"] == "<b>&__ECHARTS__.npz"


def test_the_plots_library_is_beside_its_licence_and_installed_with_the_package() -> None:
    assert {"echarts.min.js", "echarts.LICENSE", "echarts.NOTICE", "analysis.html"} <= {
        p.name for p in STATIC.iterdir()
    }
    assert "</script" not in (STATIC / "echarts.min.js").read_text(encoding="utf-8")
    assert 'server = ["static/*"]' in (STATIC.parents[1] / "pyproject.toml").read_text()


def test_a_folder_of_traces_is_one_workload(foregate: Any, tmp_path: Path) -> None:
    for seed in (0, 1):
        local_trace(seed, [20] * 2).save(tmp_path / f"{seed}.npz")
    told = foregate("analyze", str(tmp_path), "--cache", "25%", "--concurrency", "2").out
    assert told.startswith(f"{tmp_path.name}: 4 requests, 80 tokens; ")
    assert "all 80 tokens replayed, 2 requests at once" in told


def test_the_smallest_of_traces_can_be_told_of(foregate: Any, tmp_path: Path) -> None:
    trace_of(np.zeros((1, 1, 1)), [1], 1).save(tmp_path / "one.npz")
    html = tmp_path / "one.html"
    result = foregate("analyze", str(tmp_path / "one.npz"), "--window", "1", "--html", str(html))
    assert (result.code, data_of(html.read_text())["analysis"]["workload"]["num_tokens"]) == (0, 1)


@pytest.mark.parametrize(
    ("args", "why"),
    [
        (("--window", "21"), "the longest request of local.npz has 20 tokens, a window has 21"),
        (("--ratios", "1,many"), "cannot read ratios '1,many'"),
        (("--ratios", "0"), "cannot read ratios"),
        (("--cache", "120%"), "115 experts of 96"),
        (("--cache", ","), "no cache size"),
        (("--concurrency", "7"), "has 6 requests, so 7 cannot run at once"),
        (("--html", "."), "it is a directory"),
        (("--html", "nowhere/page.html"), "there is no directory nowhere"),
    ],
)
def test_what_cannot_be_done_is_one_line(foregate: Any, file: str, args: tuple[str, ...], why: str) -> None:
    result = foregate("analyze", file, *args)
    assert result.code == 1
    assert result.err.startswith("error: ")
    assert why in result.err
    assert len(result.err.splitlines()) == 1  # nothing was measured before


def test_files_that_are_no_traces_or_empty_are_one_line(foregate: Any, tmp_path: Path) -> None:
    (tmp_path / "bad.npz").write_bytes(b"no")
    random_trace(0, [0, 0]).save(tmp_path / "none.npz")
    for name, why in (
        ("bad.npz", "bad.npz cannot be used"),
        ("none.npz", "has no tokens"),
        ("gone.npz", "gone.npz: No such file"),
    ):
        result = foregate("analyze", str(tmp_path / name))
        assert (result.code, len(result.err.splitlines())) == (1, 1)
        assert why in result.err
    assert foregate("analyze", "x.npz", "--expert-size", "5Q").code == 2


def workload_of(
    rates: dict[int, float], *, best: int, enough: int, nothing_more: bool = False, helps: bool = True
) -> Workload:
    """20 experts a token, of 100."""
    curve = [
        Size(
            num_slots=slots,
            share=slots / 100,
            of_active=slots / 20,
            hit_rate={"lru": rate, "segment": rate, "belady": rate},
            prefill_hit_rate={},
            decode_hit_rate={},
        )
        for slots, rate in rates.items()
    ]
    judgement = Judgement(
        best_slots=best, enough_slots=enough, nothing_more=nothing_more, helps=helps, working_slots=None
    )
    blank: Any = None
    shape = {"num_layers": 5, "num_experts": 20, "num_active": 4, "curve": curve, "judgement": judgement}
    return Workload(**{name: shape.get(name, blank) for name in Workload.__struct_fields__})


@pytest.mark.parametrize(
    ("workload", "sentence"),
    [
        (
            workload_of({40: 0.74, 60: 0.97, 100: 0.972}, best=40, enough=60, nothing_more=True),
            "A cache of 2x one token's experts (40 of 100, 40.0MiB) hits 74%; beyond 60 experts (60.0MiB), which hit "
            "97%, nothing more is gained.",
        ),
        (
            workload_of({20: 0.9, 30: 0.93, 100: 0.96}, best=20, enough=30),
            "A cache of 1x one token's experts (20 of 100, 20.0MiB) hits 90%; beyond 30 experts (30.0MiB), which hit "
            "93%, twice as much gains less than two points.",
        ),
        (
            workload_of({25: 0.98, 50: 0.98, 100: 0.98}, best=25, enough=25, nothing_more=True),
            "A cache of 1.25x one token's experts (25 of 100, 25.0MiB) hits 98%; beyond it nothing more is gained.",
        ),
        (
            workload_of({25: 0.4, 75: 0.85, 100: 0.99}, best=25, enough=100),
            "A cache of 1.25x one token's experts (25 of 100, 25.0MiB) hits 40%, one of 75 experts (75.0MiB) 85%; "
            "every expert more pays, up to all 100 experts (100.0MiB).",
        ),
        (
            workload_of({25: 0.26, 50: 0.52, 100: 0.99}, best=50, enough=100, helps=False),
            "Caching helps little here: a cache of 2.5x one token's experts (50 of 100, 50.0MiB) hits 52%, hardly more "
            "than its share of all experts.",
        ),
        (
            workload_of({5: 0.2, 15: 0.4, 100: 0.99}, best=15, enough=100),
            "None of the sizes replayed holds the 20 experts of one token, below which LRU hits nothing and segment "
            "40% at most: give the cache that many at least.",
        ),
    ],
)
def test_the_advice_says_what_the_curve_does(workload: Workload, sentence: str) -> None:
    assert advice(workload, 1 << 20) == sentence


@pytest.mark.skipif(not REAL_TRACES.is_dir(), reason="the real traces are not here")
def test_recorded_routing_is_told_of() -> None:
    from cache.measure import measure

    trace = load_all(REAL_TRACES / "granite-3.0-1b-a400m")[0]
    found = measure(trace, sizes=[trace.num_keys // 2], replay_tokens=30)
    done = Analysis(trace="granite", expert_nbytes=None, advice=advice(found, None), workload=found)
    assert "english_prose" in text(done)
    assert data_of(page(done))["analysis"]["workload"]["num_requests"] == 3
