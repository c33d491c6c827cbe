from __future__ import annotations

import json
from pathlib import Path

import pytest
from tokenizers import Tokenizer
from transformers import AutoTokenizer

from engine.errors import CheckpointError
from engine.refactor.gguf_source import GgufSource
from tests.engine.refactor.conftest import TEMPLATE, TEXT, MakeLlama, write_gguf

SAMPLES = [
    *TEXT,
    "In 1984, x2 = 3.14!",
    "naïve café 日本語 🤖\n\ttabs",
    "  two  spaces ",
    "<|im_start|>user\nhi<|im_end|>",
]


@pytest.fixture
def written(make_llama: MakeLlama, bpe: Tokenizer, tmp_path: Path) -> Path:
    _, model = make_llama()
    out = tmp_path / "tokenizer"
    out.mkdir()
    GgufSource(write_gguf(tmp_path / "m.gguf", model, bpe)).write_tokenizer(out)
    return out


def test_the_tokenizer_encodes_as_the_one_it_was_made_from(written: Path, bpe: Tokenizer) -> None:
    rebuilt = Tokenizer.from_file(str(written / "tokenizer.json"))
    for text in SAMPLES:
        assert rebuilt.encode(text).ids == bpe.encode(text).ids
        assert rebuilt.decode(rebuilt.encode(text).ids, skip_special_tokens=False) == text


def test_digits_are_split_individually_and_no_bos_is_put_in_front(written: Path) -> None:
    rebuilt = Tokenizer.from_file(str(written / "tokenizer.json"))
    assert rebuilt.encode("2025").tokens == ["2", "0", "2", "5"]
    assert rebuilt.encode("").ids == []


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_transformers_loads_it_although_the_model_type_is_unknown(
    written: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    (written / "config.json").write_text(json.dumps({"model_type": "foregate_llama_moe"}))
    tokenizer = AutoTokenizer.from_pretrained(written)
    assert (tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token) == (
        "<|im_start|>",
        "<|im_end|>",
        "<|im_end|>",
    )
    assert tokenizer.chat_template == TEMPLATE
    messages = [{"role": "user", "content": "hi 42"}]
    ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
    assert tokenizer.decode(ids) == "<|im_start|>user\nhi 42<|im_end|>\n<|im_start|>assistant\n"
    assert ids.count(1) == 2
    assert ids.count(2) == 1
    generation = json.loads((written / "generation_config.json").read_text())
    assert generation == {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 2}


def test_an_unknown_pre_tokenizer_is_refused(make_llama: MakeLlama, bpe: Tokenizer, tmp_path: Path) -> None:
    _, model = make_llama()
    source = GgufSource(write_gguf(tmp_path / "m.gguf", model, bpe, pre="tekken"))
    with pytest.raises(CheckpointError, match=r"unknown pre-tokenizer 'tekken'; known: gpt-2, llama-bpe, smollm"):
        source.write_tokenizer(tmp_path)


def test_llama3s_tokenizer_puts_bos_in_front(make_llama: MakeLlama, bpe: Tokenizer, tmp_path: Path) -> None:
    _, model = make_llama()
    source = GgufSource(write_gguf(tmp_path / "m.gguf", model, bpe, pre="llama-bpe", add_bos=True))
    source.write_tokenizer(tmp_path)
    rebuilt = Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    assert rebuilt.encode("fox").ids[0] == 1
    assert rebuilt.decode(rebuilt.encode("The café, 2025!").ids) == "The café, 2025!"
