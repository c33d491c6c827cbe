"""`python -m engine.refactor.make_demo_plan`: learn the demo model's committed plan anew, from public parts alone."""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from engine.refactor import corpus
from engine.refactor.calibrate import learn_plan
from engine.refactor.chats import ChatWriter
from engine.refactor.corpus import Passages
from engine.refactor.demo import PROMPTS_PATH, DemoModel
from engine.refactor.perplexity import perplexities
from engine.refactor.plan import SplitSettings
from engine.refactor.source import DenseSource, open_source

Answers = list[list[int]]  # token ids, prompt by prompt

SEQUENCE_LENGTH = 512
NUM_CHAT_SEQS = 64
NUM_PROSE_SEQS = 32
NUM_HELD_OUT_SEQS = 16
ANSWER_LENGTH = 192  # tokens
TEMPERATURES = (0.0, 0.8)  # each prompt is answered once at each; greedy first, which is also what is judged
SEED = 1


def main() -> None:
    parser = argparse.ArgumentParser(description=f"{__doc__} Takes about half an hour on two idle cores.")
    parser.add_argument("--out", type=Path, default=DemoModel().plan_path, help="where to write the plan")
    parser.add_argument(
        "--chats", type=Path, help="keep the answers in this file, and do not write them anew if it exists"
    )
    arguments = parser.parse_args()
    with DemoModel().dense() as path:
        source = open_source(path)
        tokenizer = corpus.load_tokenizer(source)
        prompts = corpus.chat_prompts(PROMPTS_PATH.read_text(encoding="utf-8").splitlines(), tokenizer)
        answers = _answers(source, prompts, arguments.chats)
        learned_from, judged_on = demo_texts(tokenizer, prompts, answers)
        plan, fits = learn_plan(source, learned_from, SplitSettings(), _reporter("layers split"), SEED)
        arguments.out.write_bytes(plan.to_bytes())
        for index, fit in enumerate(fits):
            _say(f"layer {index}: error {fit.router:.5f} (oracle {fit.oracle:.5f}, random {fit.random:.5f})")
        for result in perplexities(source, plan, judged_on, _reporter("layers measured")):
            _say(f"{result.name}: {result.dense:.3f} -> {result.refactored:.3f} ({result.ratio:.3f}x)")


def _answers(source: DenseSource, prompts: list[list[int]], kept: Path | None) -> list[Answers]:
    """One answer to each prompt at each of `TEMPERATURES`."""
    if kept is not None and kept.is_file():
        read: list[Answers] = json.loads(kept.read_text(encoding="utf-8"))
        return read
    writer = ChatWriter(source)
    answers = [
        writer.write(prompts, ANSWER_LENGTH, temperature=t, seed=SEED, progress=_reporter(f"answers at {t}"))
        for t in TEMPERATURES
    ]
    if kept is not None:
        kept.write_text(json.dumps(answers), encoding="utf-8")
    return answers


def demo_texts(
    tokenizer: Any, prompts: list[list[int]], answers: list[Answers]
) -> tuple[list[Passages], list[Passages]]:
    """What the demo's plan is learned from, and what it is judged on: the model's own chats, and prose."""
    documents = corpus.python_topics()
    learned = [i for i in range(len(prompts)) if not corpus.held_out(i)]
    held = [i for i in range(len(prompts)) if corpus.held_out(i)]
    newline = tokenizer.encode("\n", add_special_tokens=False)  # the chat template puts one between turns
    chats = [prompts[i] + some[i] + newline for some in answers for i in learned]
    prose, held_prose = (
        corpus.prose(
            "prose", [t for i, t in enumerate(documents) if corpus.held_out(i) == held_out], tokenizer, SEQUENCE_LENGTH
        )
        for held_out in (False, True)
    )
    return (
        [
            corpus.packed("chats", chats, SEQUENCE_LENGTH).sample(NUM_CHAT_SEQS, SEED),
            prose.sample(NUM_PROSE_SEQS, SEED),
        ],
        [
            corpus.chats("own chats", [prompts[i] for i in held], [answers[0][i] for i in held]),
            held_prose.sample(NUM_HELD_OUT_SEQS, SEED),
        ],
    )


def _reporter(what: str) -> Callable[[int, int], None]:
    start = time.monotonic()
    return lambda done, total: _say(f"{what}: {done} of {total} ({time.monotonic() - start:.0f} s)")


def _say(line: str) -> None:
    print(line, file=sys.stderr)  # noqa: T201 (a script's face)


if __name__ == "__main__":
    main()
