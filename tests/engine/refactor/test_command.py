from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer

from engine.errors import CheckpointError, ConfigError
from engine.refactor import corpus
from engine.refactor.calibrate import learn_plan
from engine.refactor.chats import ChatWriter
from engine.refactor.command import RefactorReport, refactor
from engine.refactor.perplexity import perplexities
from engine.refactor.plan import RefactorPlan, SplitSettings
from engine.refactor.source import open_source
from tests.engine.refactor.conftest import TEXT, MakeLlama, write_gguf
from tests.engine.refactor.moe_twin import load_twin
from tests.engine.refactor.test_write import files

SIZES = {"num_experts": 4, "shared_size": 32, "num_active": 3}
SETTINGS = SplitSettings(**SIZES)
SERVED = {"num_experts": 2, "shared_size": 32, "num_active": 1}  # experts of 32 neurons, as the kernels want


def random_text(num_seqs: int, length: int, seed: int = 0, vocab_size: int = 300) -> corpus.Passages:
    tokens = torch.randint(3, vocab_size, (num_seqs, length), generator=torch.Generator().manual_seed(seed))
    return corpus.Passages("random", tokens, torch.ones(num_seqs, length - 1, dtype=torch.bool))


@pytest.fixture
def text_file(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text("\n\n".join(f"{line} Take {i}." for i in range(100) for line in TEXT))
    return path


def test_a_learned_plan_loses_less_than_a_random_one(make_llama: MakeLlama) -> None:
    source = open_source(make_llama()[0])
    plan, fits = learn_plan(source, [random_text(8, 64)], SETTINGS)
    plan.check(source.config)
    for fit in fits:
        assert fit.oracle < fit.router < fit.random
    unseen = random_text(4, 64, seed=1)
    assert perplexities(source, plan, [unseen])[0].dense > 1
    again, _ = learn_plan(source, [random_text(8, 64)], SETTINGS)
    assert again.sha256() == plan.sha256()


def test_perplexities_are_those_of_the_written_models(make_llama: MakeLlama, tmp_path: Path, text_file: Path) -> None:
    path, dense = make_llama()
    report = refactor(path, tmp_path / "moe", calibration=[text_file], dtype="float32", **SERVED)
    source = open_source(path)
    tokenizer = corpus.load_tokenizer(source)
    documents = corpus.read_documents([text_file])
    held = [text for i, text in enumerate(documents) if corpus.held_out(i)]
    text = corpus.prose("held", held, tokenizer, 256).sample(16, 0)
    for model, found in (
        (dense, report.perplexities[0].dense),
        (load_twin(tmp_path / "moe"), report.perplexities[0].refactored),
    ):
        with torch.inference_mode():
            loss = model(text.tokens, labels=text.tokens).loss
        assert found == pytest.approx(math.exp(loss), rel=1e-3)
    assert report.active_share == pytest.approx(64 / 96)
    assert report.out == tmp_path / "moe"


def test_a_saved_plan_writes_the_same_checkpoint_again(make_llama: MakeLlama, tmp_path: Path, text_file: Path) -> None:
    path, _ = make_llama()
    kept = tmp_path / "plan.safetensors"
    steps: list[str] = []
    refactor(
        path,
        tmp_path / "learned",
        calibration=[text_file],
        save_plan=kept,
        progress=lambda what, done, total: steps.append(what),
        **SERVED,
    )
    assert list(dict.fromkeys(steps)) == ["calibrate", "write", "measure"]
    refactor(path, tmp_path / "planned", calibration=[text_file], plan=kept)
    assert files(tmp_path / "learned") == files(tmp_path / "planned")
    assert RefactorPlan.load(kept).settings == SplitSettings(**SERVED)


def test_what_cannot_work_is_refused_before_anything_is_written(
    make_llama: MakeLlama, tmp_path: Path, text_file: Path
) -> None:
    path, _ = make_llama()
    out = tmp_path / "moe"
    with pytest.raises(ConfigError, match="cannot cut 96 neurons into 512 shared ones"):
        refactor(path, out)
    with pytest.raises(ConfigError, match=r"experts of 16 neurons cannot be served; .* multiple of 32"):
        refactor(path, out, calibration=[text_file], **SIZES)
    with pytest.raises(ConfigError, match="cannot read calibration text"):
        refactor(path, out, calibration=[tmp_path / "none.txt"], **SERVED)
    (tmp_path / "short.txt").write_text("Too short.")
    with pytest.raises(ConfigError, match="too few"):
        refactor(path, out, calibration=[tmp_path / "short.txt"], **SERVED)
    with pytest.raises(CheckpointError, match="neither a checkpoint directory nor"):
        refactor(tmp_path / "none", out, **SERVED)
    assert not out.exists()
    with pytest.raises(CheckpointError, match="exists"):
        refactor(path, tmp_path, calibration=[text_file], **SERVED)


def test_chats_are_written_greedily_as_transformers_would_whatever_shares_the_batch(
    make_llama: MakeLlama, bpe: Tokenizer, tmp_path: Path
) -> None:
    _, model = make_llama()
    source = open_source(write_gguf(tmp_path / "m.gguf", model, bpe))
    tokenizer = corpus.load_tokenizer(source)
    prompts = corpus.chat_prompts(["Hi", "What is the capital of France?", "Count: 1 2 3"], tokenizer)
    answers = ChatWriter(source).write(prompts, 12)
    assert answers == ChatWriter(source).write(prompts, 12, batch_size=1)
    for prompt, answer in zip(prompts, answers, strict=True):
        whole = model.generate(torch.tensor([prompt]), max_new_tokens=12, do_sample=False, pad_token_id=2)
        assert whole[0, len(prompt) :].tolist() == answer
    sampled = [ChatWriter(source).write(prompts, 12, temperature=1.0, seed=seed) for seed in (1, 1, 2)]
    assert sampled[0] == sampled[1] != sampled[2]


def test_only_the_answers_of_a_chat_are_scored() -> None:
    chats = corpus.chats("chats", [[1, 2, 3], [1]], [[4, 5], [6, 7]])
    assert chats.tokens.tolist() == [[1, 2, 3, 4, 5], [1, 6, 7, 0, 0]]
    assert chats.scored.tolist() == [[False, False, True, True], [True, True, False, False]]


def test_distillation_is_resumed_and_each_text_is_a_domain(
    make_llama: MakeLlama, tmp_path: Path, text_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("engine.refactor.command._can_compile", lambda: False)  # a minute, for a tiny model
    path, _ = make_llama(num_hidden_layers=3)
    other = tmp_path / "other.txt"
    other.write_text("\n\n".join(f"Counting: {' '.join(str(i + j) for j in range(30))}" for i in range(400)))
    options: dict[str, Any] = {"calibration": [text_file, other], "dense_layers": [0], "distil_tokens": 3 * 8 * 256}
    steps: list[str] = []

    def refactor_to(name: str) -> RefactorReport:
        steps.clear()
        return refactor(
            path,
            tmp_path / name,
            state=tmp_path / "state",
            save_plan=tmp_path / f"{name}.plan",
            rank=2,
            progress=lambda what, done, total: steps.append(what),
            **options,
            **SERVED,
        )

    report = refactor_to("one")
    assert steps.count("distil") == 3
    assert [measured.name for measured in report.perplexities] == [str(text_file), str(other)]
    assert report.locality.popularity.shape == (2, 2)
    assert 0 <= report.locality.specialisation <= 1
    assert report.active_share == pytest.approx((96 + 2 * 64) / (3 * 96))
    plan = RefactorPlan.load(tmp_path / "one.plan")
    assert plan.healing is not None
    assert plan.healing.layers == (1, 2)
    refactor_to("two")
    assert "distil" not in steps  # all of it was in the state
    assert files(tmp_path / "one") == files(tmp_path / "two")
