"""`python -m engine.refactor.compare_answers`: everyday questions to the dense and the refactored demo, as a table."""

from __future__ import annotations

import argparse
import sys
from collections import Counter
from pathlib import Path

from engine.refactor import corpus
from engine.refactor.chats import ChatWriter
from engine.refactor.demo import DATA, DemoModel
from engine.refactor.plan import RefactorPlan
from engine.refactor.source import open_source

QUESTIONS_PATH = DATA / "questions.txt"
ANSWER_LENGTH = 120  # tokens
_LOOP_LENGTH = 6  # words that come again and again
_LOOP_TIMES = 3


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--plan", type=Path, default=DemoModel().plan_path)
    arguments = parser.parse_args()
    questions = QUESTIONS_PATH.read_text(encoding="utf-8").splitlines()
    with DemoModel().dense() as path:
        source = open_source(path)
        tokenizer = corpus.load_tokenizer(source)
        prompts = corpus.chat_prompts(questions, tokenizer)
        columns = []
        for plan in (None, RefactorPlan.load(arguments.plan)):
            answers = ChatWriter(source, plan).write(prompts, ANSWER_LENGTH)
            columns.append([tokenizer.decode(answer, skip_special_tokens=True).strip() for answer in answers])
    sys.stdout.write(table(questions, *columns))


def table(questions: list[str], dense: list[str], refactored: list[str]) -> str:
    """Markdown: question, both answers, and which of them repeat themselves."""
    rows = ["| question | dense | refactored | repeats itself |", "| --- | --- | --- | --- |"]
    for question, *answers in zip(questions, dense, refactored, strict=True):
        loops = ", ".join(
            name for name, answer in zip(("dense", "refactored"), answers, strict=True) if repeats_itself(answer)
        )
        rows.append("| " + " | ".join([*(_cell(text) for text in (question, *answers)), loops]) + " |")
    return "\n".join(rows) + "\n"


def repeats_itself(text: str) -> bool:
    """Whether some words in a row come up again and again."""
    words = text.split()
    runs = Counter(tuple(words[i : i + _LOOP_LENGTH]) for i in range(len(words) - _LOOP_LENGTH + 1))
    return any(times >= _LOOP_TIMES for times in runs.values())


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", "<br>")


if __name__ == "__main__":
    main()
