"""Tokenizer files from GGUF metadata: byte-level BPE vocabulary, merges, special tokens, chat template."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, processors

from engine.errors import CheckpointError

_CONTROL, _USER_DEFINED = 3, 4  # of gguf.TokenType
_LLAMA3_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def _smollm() -> Any:
    digits = pre_tokenizers.Digits(individual_digits=True)
    return pre_tokenizers.Sequence([digits, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)])


def _gpt2() -> Any:
    return pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)


def _llama3() -> Any:
    split = pre_tokenizers.Split(Regex(_LLAMA3_SPLIT), behavior="isolated")
    return pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])


# how text is cut before merging, by the GGUF's tokenizer.ggml.pre
PRE_TOKENIZERS: dict[str, Callable[[], Any]] = {"smollm": _smollm, "gpt-2": _gpt2, "llama-bpe": _llama3}


def build_tokenizer(metadata: dict[str, Any], where: str) -> Tokenizer:
    """The tokenizer that `tokenizer.ggml.*` describes (`where` names the file in errors). Raises `CheckpointError`."""
    model, pre = metadata.get("tokenizer.ggml.model"), metadata.get("tokenizer.ggml.pre", "gpt-2")
    if model != "gpt2":
        raise CheckpointError(f"{where}: cannot rebuild a {model!r} tokenizer; known: 'gpt2' (byte-level BPE)")
    if pre not in PRE_TOKENIZERS:
        raise CheckpointError(f"{where}: unknown pre-tokenizer {pre!r}; known: {', '.join(sorted(PRE_TOKENIZERS))}")
    try:
        tokens: list[str] = metadata["tokenizer.ggml.tokens"]
        merges = [tuple(merge.split(" ", 1)) for merge in metadata["tokenizer.ggml.merges"]]
    except KeyError as error:
        raise CheckpointError(f"{where}: {error.args[0]} is missing") from error
    vocabulary = {token: token_id for token_id, token in enumerate(tokens)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=merges, ignore_merges=pre == "llama-bpe"))
    tokenizer.pre_tokenizer = PRE_TOKENIZERS[pre]()
    tokenizer.decoder = decoders.ByteLevel()
    kinds: list[int] = metadata.get("tokenizer.ggml.token_type", [])
    for token, kind in zip(tokens, kinds, strict=False):
        if kind == _CONTROL:
            tokenizer.add_special_tokens([AddedToken(token, normalized=False, special=True)])
        elif kind == _USER_DEFINED:
            tokenizer.add_tokens([AddedToken(token, normalized=False)])
    byte_level = processors.ByteLevel(add_prefix_space=False, trim_offsets=True, use_regex=True)
    if metadata.get("tokenizer.ggml.add_bos_token", pre == "llama-bpe"):
        bos_id = metadata["tokenizer.ggml.bos_token_id"]
        bos = tokens[bos_id]
        prefix = processors.TemplateProcessing(
            single=f"{bos} $A", pair=f"{bos} $A {bos}:1 $B:1", special_tokens=[(bos, bos_id)]
        )
        tokenizer.post_processor = processors.Sequence([byte_level, prefix])
    else:
        tokenizer.post_processor = byte_level
    return tokenizer


def write_tokenizer_files(metadata: dict[str, Any], out: Path, where: str) -> None:
    """Write tokenizer.json, tokenizer_config.json and generation_config.json into the directory `out`."""
    from engine.refactor.source import write_json

    tokens: list[str] = metadata.get("tokenizer.ggml.tokens", [])
    (out / "tokenizer.json").write_text(build_tokenizer(metadata, where).to_str(pretty=True) + "\n", encoding="utf-8")
    settings: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "clean_up_tokenization_spaces": False,
        "model_max_length": metadata.get("llama.context_length"),
    }
    ids: dict[str, int] = {}
    for name, key in (("bos", "bos"), ("eos", "eos"), ("unk", "unknown"), ("pad", "padding")):
        token_id = metadata.get(f"tokenizer.ggml.{key}_token_id")
        if token_id is not None:
            settings[f"{name}_token"] = tokens[token_id]
            ids[f"{name}_token_id"] = token_id
    if "tokenizer.chat_template" in metadata:
        settings["chat_template"] = metadata["tokenizer.chat_template"]
    write_json(out / "tokenizer_config.json", settings)
    write_json(out / "generation_config.json", {key: ids[key] for key in ids if key != "unk_token_id"})
