"""`python -m engine.refactor.make_demo_plan`: learn the demo model's committed plan anew, from public parts alone."""

from __future__ import annotations

import argparse
import json
import logging
import math
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from engine.refactor import corpus, demo_corpus
from engine.refactor.calibrate import learn_plan
from engine.refactor.compare_answers import QUESTIONS_PATH
from engine.refactor.corpus import Passages
from engine.refactor.demo import PROMPTS_PATH, DemoModel
from engine.refactor.demo_chats import Chats, write_chats
from engine.refactor.distil import DistilSettings, Text, distil
from engine.refactor.learn_pregate import PregateSettings, learn_pregate
from engine.refactor.perplexity import perplexities
from engine.refactor.plan import RefactorPlan, SplitSettings
from engine.refactor.source import DenseSource, open_source

_log = logging.getLogger(__name__)

SEQUENCE_LENGTH = 256
SETTINGS = SplitSettings(  # docs/refactor.md says why
    num_experts=32, shared_size=512, num_active=14, dense_layers=(*range(9), 29)
)
NUM_SERVED = 24  # active experts of the demo: what is learned with fewer answers better with a few more
CHAT_SHARE = 1.7  # of the chats in distillation; each domain's is 1
NUM_DOMAIN_SEQS = 7000  # at most, of each domain, to learn from
NUM_CALIBRATION_SEQS = 28  # of each domain and of the chats, for the split
NUM_HELD_OUT_SEQS = 32  # of each domain
SEED = 1


def main() -> None:
    parser = argparse.ArgumentParser(
        description=f"{__doc__} Takes some hours on two idle cores, and a Debian. Stopped, it goes on where it was."
    )
    parser.add_argument("--work", type=Path, required=True, help="directory for what each stage leaves to the next")
    parser.add_argument("--out", type=Path, default=DemoModel().plan_path, help="where to write the plan")
    parser.add_argument("--distil-tokens", type=int, default=DistilSettings().num_tokens)
    parser.add_argument("--pregate-tokens", type=int, default=PregateSettings().num_distil_tokens)
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", stream=sys.stderr)
    arguments.work.mkdir(parents=True, exist_ok=True)
    with DemoModel().dense() as path:
        make_plan(
            open_source(path),
            arguments.work,
            arguments.out,
            DistilSettings(num_tokens=arguments.distil_tokens, seed=SEED),
            PregateSettings(num_distil_tokens=arguments.pregate_tokens, seed=SEED),
        )


def make_plan(
    source: DenseSource, work: Path, out: Path, distil_settings: DistilSettings, pregate_settings: PregateSettings
) -> None:
    """Every stage, each kept in `work`: packages, chats, split, distilled plan, pre-gate."""
    demo_corpus.fetch_packages(work / "packages")
    learned_chats, held_chats = _chats(source, work / "chats.json")
    tokenizer = corpus.load_tokenizer(source)
    texts = _learned_texts(tokenizer, demo_corpus.documents(work / "packages", held_out=False), learned_chats)
    judged = _judged_texts(tokenizer, demo_corpus.documents(work / "packages", held_out=True), held_chats)

    def split() -> RefactorPlan:
        samples = [text.passages.sample(NUM_CALIBRATION_SEQS, SEED) for text in texts]
        return learn_plan(source, samples, SETTINGS, _reporter("layers split"), SEED)[0]

    def heal() -> RefactorPlan:
        return distil(
            source,
            plan,
            texts,
            distil_settings,
            state=work / "distil.state",
            progress=_losses("steps distilled"),
        )

    def pregate() -> RefactorPlan:
        state = work / "pregate.state"
        learned = learn_pregate(source, plan, texts, pregate_settings, state=state, progress=_pregate_losses())
        return replace(plan, pregate=learned)

    for name, stage in (("split", split), ("distilled", heal), ("pregated", pregate)):
        path = work / f"{name}.safetensors"
        if path.exists():
            plan = RefactorPlan.load(path)
            continue
        plan = stage()
        path.write_bytes(plan.to_bytes())
        if name != "pregated":
            report(source, plan, judged)
    out.write_bytes(replace(plan, settings=replace(plan.settings, num_active=NUM_SERVED)).to_bytes())


def report(source: DenseSource, plan: RefactorPlan, judged: Sequence[Passages]) -> None:
    """Log the perplexities of the plan beside the dense model's."""
    for result in perplexities(source, plan, list(judged), _reporter("layers measured")):
        _log.info("%s: %.3f -> %.3f (%.3fx)", result.name, result.dense, result.refactored, result.ratio)


def _chats(source: DenseSource, path: Path) -> tuple[Chats, Chats]:
    if not path.exists():
        prompts = PROMPTS_PATH.read_text(encoding="utf-8").splitlines()
        questions = QUESTIONS_PATH.read_text(encoding="utf-8").splitlines()
        written = write_chats(
            source, prompts, never=questions, seed=SEED, progress=lambda what, *n: _reporter(what)(*n)
        )
        path.write_text(json.dumps([asdict(chats) for chats in written]), encoding="utf-8")
    learned, held = (Chats(**chats) for chats in json.loads(path.read_text(encoding="utf-8")))
    return learned, held


def _learned_texts(tokenizer: Any, documents: dict[str, list[str]], chats: Chats) -> list[Text]:
    newline = tokenizer.encode("\n", add_special_tokens=False)  # the chat template puts one between turns
    texts = [
        Text(corpus.prose(name, pieces, tokenizer, SEQUENCE_LENGTH).sample(NUM_DOMAIN_SEQS, SEED))
        for name, pieces in documents.items()
    ]
    turns = [[*prompt, *answer, *newline] for prompt, answer in zip(chats.prompts, chats.answers, strict=True)]
    return [*texts, Text(corpus.packed("chats", turns, SEQUENCE_LENGTH), CHAT_SHARE)]


def _judged_texts(tokenizer: Any, documents: dict[str, list[str]], chats: Chats) -> list[Passages]:
    texts = [
        corpus.prose(name, pieces, tokenizer, SEQUENCE_LENGTH).sample(NUM_HELD_OUT_SEQS, SEED)
        for name, pieces in documents.items()
    ]
    return [*texts, corpus.chats("own chats", chats.prompts, chats.answers)]


def _reporter(what: str) -> Callable[[int, int], None]:
    return lambda done, total: _log.info("%s: %d of %d", what, done, total) if _is_told(done, total) else None


def _losses(what: str) -> Callable[[int, int, float], None]:
    start = time.monotonic()

    def tell(done: int, total: int, loss: float) -> None:
        if _is_told(done, total):
            _log.info("%s: %d of %d, divergence %.4f (%.0f s)", what, done, total, loss, time.monotonic() - start)

    return tell


def _pregate_losses() -> Callable[[str, int, int, float], None]:
    def tell(what: str, done: int, total: int, loss: float) -> None:
        if _is_told(done, total):
            _log.info("%s: %d of %d%s", what, done, total, "" if math.isnan(loss) else f", loss {loss:.4f}")

    return tell


def _is_told(done: int, total: int) -> bool:
    return done == total or done % max(1, total // 50) == 0


if __name__ == "__main__":
    main()
