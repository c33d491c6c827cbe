"""Texts of four domains that the demo is distilled on and judged by: Debian's and Python's documentation, and code.

Needs a Debian with `apt-get` and `dpkg-deb`, or a directory where the packages were unpacked before.
"""

from __future__ import annotations

import hashlib
import re
import subprocess
import sysconfig
from collections.abc import Iterator, Sequence
from html.parser import HTMLParser
from pathlib import Path

from engine.errors import CheckpointError

PACKAGES = (
    "anarchism",
    "debian-handbook",
    "debian-reference-de",
    "debian-reference-en",
    "debian-reference-es",
    "debian-reference-fr",
    "debian-reference-it",
    "debian-reference-pt",
    "developers-reference",
    "fortunes",
    "gnome-user-docs",
    "python3.11-doc",
)
DOMAINS = ("docs", "prose", "code", "languages")
_LANGUAGES = {"fr": "fr-FR", "de": "de-DE", "es": "es-ES", "it": "it-IT", "pt": "pt-BR"}
_NOT_PROSE = ("ascii-art", "zippy")
_NOT_CODE = ("site-packages", "test", "pydoc_data", "idlelib", "encodings")
_PIECE_LENGTH = 4000  # characters, about, in one document
_HELD_OUT_EVERY = 12  # one file in twelve is for measuring, not for learning


def fetch_packages(directory: Path) -> None:
    """Download and unpack the packages that are not there yet, each into its own folder. Raises `CheckpointError`."""
    directory.mkdir(parents=True, exist_ok=True)
    for package in PACKAGES:
        if (directory / package).is_dir():
            continue
        try:
            subprocess.run(["apt-get", "download", "--quiet", package], cwd=directory, check=True, capture_output=True)
            (archive,) = directory.glob(f"{package}_*.deb")
            unpacked = directory / f".{package}.partial"
            subprocess.run(["dpkg-deb", "--extract", archive, unpacked], check=True, capture_output=True)
            archive.unlink()
            unpacked.rename(directory / package)
        except (OSError, subprocess.CalledProcessError, ValueError) as error:
            raise CheckpointError(f"could not fetch the Debian package {package}: {error}") from error


def documents(directory: Path, *, held_out: bool) -> dict[str, list[str]]:
    """Pieces of text by domain, from the files that are held out or from the others; in a fixed order."""
    return {
        domain: [
            piece
            for index, text in enumerate(_texts(domain, directory))
            if _is_held_out(domain, index) == held_out
            for piece in _pieces(text)
        ]
        for domain in DOMAINS
    }


def _is_held_out(domain: str, index: int) -> bool:
    return int(hashlib.sha256(f"{domain}{index}".encode()).hexdigest(), 16) % _HELD_OUT_EVERY == 0


def _texts(domain: str, directory: Path) -> Iterator[str]:
    if domain == "docs":
        yield from _pages(directory / "debian-handbook", "en-US/*.html")
        yield from _pages(directory / "debian-reference-en", "ch*.en.html")
        for path in sorted((directory / "developers-reference").rglob("*.html")):
            if "." not in path.stem:  # the others are translations
                yield page_text(_read(path))
        yield from map(_read, _files((directory / "python3.11-doc").rglob("*.rst.txt")))
    elif domain == "prose":
        yield from _pages(directory / "gnome-user-docs", "C/**/*.page")
        for path in _files((directory / "fortunes/usr/share/games/fortunes").iterdir()):
            if path.suffix == "" and path.name not in _NOT_PROSE:
                yield _read(path).replace("\n%\n", "\n\n")
        yield from _pages(directory / "anarchism", "sec*.html")
    elif domain == "code":
        library = Path(sysconfig.get_paths()["stdlib"])
        for path in [*sorted(library.glob("*.py")), *sorted(library.glob("*/*.py"))]:
            if not any(word in str(path) for word in _NOT_CODE):
                yield _read(path)
    else:
        for language, region in _LANGUAGES.items():
            yield from _pages(directory / f"debian-reference-{language}", f"ch*.{language}.html")
            yield from _pages(directory / "debian-handbook", f"{region}/*.html")


def _files(paths: Iterator[Path]) -> list[Path]:
    return sorted(path for path in paths if path.is_file())


def _pages(directory: Path, pattern: str) -> Iterator[str]:
    for path in sorted(directory.rglob(pattern)):
        yield page_text(_read(path))


def _read(path: Path) -> str:
    return path.read_text(encoding="utf-8", errors="ignore")


def page_text(html: str) -> str:
    """The text of an HTML page; blocks become lines, paragraphs and headings have an empty line before them."""
    parser = _TextParser()
    parser.feed(html)
    text = re.sub(r"[ \t]*\n[ \t]*", "\n", "".join(parser.parts))
    return re.sub(r"\n{3,}", "\n\n", text).strip()


def _pieces(text: str) -> Sequence[str]:
    """Cut at empty lines into pieces of about `_PIECE_LENGTH`; a short rest is left out."""
    pieces, current = [], ""
    for paragraph in text.split("\n\n"):
        current += f"{paragraph}\n\n"
        if len(current) > _PIECE_LENGTH:
            pieces.append(current.strip())
            current = ""
    if len(current) > _PIECE_LENGTH // 4:
        pieces.append(current.strip())
    return pieces


class _TextParser(HTMLParser):
    _BLOCKS = frozenset(
        ["p", "div", "li", "h1", "h2", "h3", "h4", "h5", "pre", "tr", "dt", "dd", "br", "ul", "ol", "table", "title"]
    )
    _APART = frozenset(["p", "h1", "h2", "h3"])
    _SKIPPED = frozenset(["script", "style", "head"])

    def __init__(self) -> None:
        super().__init__()
        self.parts: list[str] = []
        self._skipping = 0

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self._skipping += tag in self._SKIPPED
        if tag in self._BLOCKS:
            self.parts.append("\n\n" if tag in self._APART else "\n")

    def handle_endtag(self, tag: str) -> None:
        self._skipping -= tag in self._SKIPPED
        if tag in self._BLOCKS:
            self.parts.append("\n")

    def handle_data(self, data: str) -> None:
        if not self._skipping:
            self.parts.append(data)
