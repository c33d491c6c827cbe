"""What the load test asks: prompts by domain, built in or from a file. Knows nothing of HTTP or locust."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from pathlib import Path

import msgspec

_ROOT = Path(__file__).parents[1]
_OURS = _ROOT / "engine" / "refactor" / "data"
BUILT_IN = {
    "questions": _OURS / "questions.txt",
    "instructions": _OURS / "prompts.txt",
    **{name: _ROOT / "loadtest" / "data" / f"{name}.txt" for name in ("code", "maths", "languages")},
}


class Prompts:
    """Prompts of one or several domains."""

    def __init__(self, by_domain: Mapping[str, Sequence[str]]) -> None:
        """Raises `ValueError` without any prompt."""
        self._by_domain = {domain: tuple(prompts) for domain, prompts in by_domain.items() if prompts}
        if not self._by_domain:
            raise ValueError("there is no prompt")

    @property
    def domains(self) -> list[str]:
        return sorted(self._by_domain)

    def of(self, domains: Sequence[str]) -> Prompts:
        """Only these; raises `ValueError` for a domain that there is not."""
        unknown = sorted(set(domains) - set(self._by_domain))
        if unknown:
            raise ValueError(f"unknown domain {unknown[0]!r}; known: {self.domains}")
        return Prompts({domain: self._by_domain[domain] for domain in domains})

    def pick(self, rng: random.Random) -> tuple[str, str]:
        """(domain, prompt): each domain is as likely as the others, however many prompts it has."""
        domain = rng.choice(self.domains)
        return domain, rng.choice(self._by_domain[domain])

    def long(self, rng: random.Random, num_words: int) -> str:
        """About `num_words` and a question about them. Begins with a number of its own: no prefix cache has it."""
        words: list[str] = []
        while len(words) < num_words:
            words += self.pick(rng)[1].split()
        return f"Notes {rng.getrandbits(48):012x}: {' '.join(words[:num_words])}\n\nWhat are these notes about?"


def built_in() -> Prompts:
    return Prompts({domain: _lines(path) for domain, path in BUILT_IN.items()})


def from_file(path: Path) -> Prompts:
    """A `.jsonl` file of objects with `prompt` and, if they like, `domain`; any other has one prompt a line.

    Raises `ValueError` and `OSError`.
    """
    if path.suffix != ".jsonl":
        return Prompts({path.stem: _lines(path)})
    by_domain: dict[str, list[str]] = {}
    for number, line in enumerate(_lines(path), start=1):
        try:
            row = msgspec.json.decode(line, type=_Row)
        except msgspec.DecodeError as exc:
            raise ValueError(f"{path}, prompt {number}: {exc}") from None
        by_domain.setdefault(row.domain or path.stem, []).append(row.prompt)
    return Prompts(by_domain)


class _Row(msgspec.Struct):
    prompt: str
    domain: str = ""


def _lines(path: Path) -> list[str]:
    return [line.strip() for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
