"""The demo's texts: pages without their mark-up, files held out whole, and chats that are the dense model's own."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest
from tokenizers import Tokenizer

from engine.errors import CheckpointError
from engine.refactor import demo_chats, demo_corpus
from engine.refactor.demo_chats import write_chats
from engine.refactor.source import open_source
from tests.engine.refactor.conftest import MakeLlama, write_gguf
from tests.engine.tiny_models import reference_greedy


def test_a_page_becomes_its_paragraphs():
    page = """<html><head><title>no</title><style>p {}</style></head><body><h1>Title</h1>
    <p>One <b>bold</b> &amp; plain.</p><ul><li>first</li><li>second</li></ul>
    <script>let x;</script><p>Two.</p></body></html>"""
    assert demo_corpus.page_text(page) == "Title\n\nOne bold & plain.\n\nfirst\n\nsecond\n\nTwo."


@pytest.fixture
def packages(tmp_path: Path) -> Path:
    """Unpacked packages with little in them."""
    for package in demo_corpus.PACKAGES:
        (tmp_path / package).mkdir()
    (tmp_path / "fortunes/usr/share/games/fortunes").mkdir(parents=True)
    pages = tmp_path / "debian-handbook/html"
    for region in ("en-US", "fr-FR"):
        (pages / region).mkdir(parents=True)
        for i in range(60):
            (pages / region / f"{i:02}.html").write_text(f"<p>{region} {i} " + "words and words. " * 100)
    return tmp_path


def test_what_is_held_out_is_never_learned_from(packages: Path):
    learned, held = (demo_corpus.documents(packages, held_out=out) for out in (False, True))
    assert tuple(learned) == tuple(held) == demo_corpus.DOMAINS
    for domain in ("docs", "languages"):
        assert not set(learned[domain]) & set(held[domain])
        assert len(learned[domain]) + len(held[domain]) == 60
        assert 1 <= len(held[domain]) <= 12
    assert all(text.startswith("fr-FR") for text in learned["languages"])
    assert any("def " in text for text in learned["code"])
    assert demo_corpus.documents(packages, held_out=True) == held


def test_a_package_that_cannot_be_fetched_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def fail(command: list[str], **options: object) -> None:
        raise subprocess.CalledProcessError(100, command)

    monkeypatch.setattr(subprocess, "run", fail)
    with pytest.raises(CheckpointError, match=f"could not fetch the Debian package {demo_corpus.PACKAGES[0]}"):
        demo_corpus.fetch_packages(tmp_path / "packages")
    assert not any((tmp_path / "packages").iterdir())


def test_chats_are_the_dense_models_own(
    make_llama: MakeLlama, bpe: Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(demo_chats, "ANSWER_LENGTH", 12)
    monkeypatch.setattr(demo_chats, "_KV_NBYTES", 1 << 24)
    _, model = make_llama(intermediate_size=128, hidden_size=64)
    source = open_source(write_gguf(tmp_path / "dense.gguf", model, bpe))
    prompts = [f"What is {i} and {i + 1}?" for i in range(13)]
    seen: list[str] = []
    learned, held = write_chats(
        source, prompts, num_invented=8, seed=1, progress=lambda what, done, total: seen.append(what)
    )
    assert {"prompts", "answers"} == set(seen)
    assert len(held.prompts) >= 3  # 0, 6 and 12, and what was invented
    assert len(learned.prompts) >= 10
    assert all(0 < len(answer) <= 12 for answer in (*learned.answers, *held.answers))
    agreed = 0  # tokens before the first that differs, which rounding to bfloat16 makes happen
    for prompt, answer in zip(held.prompts[:3], held.answers[:3], strict=True):
        expected = reference_greedy(model, prompt, 12)
        agreed += next((i for i, (a, b) in enumerate(zip(answer, expected, strict=False)) if a != b), len(answer))
    assert agreed >= 6
