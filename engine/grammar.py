"""What an answer's text must be, from the request's words to a matcher of tokens. llguidance does the matching.

Knows no torch and no requests: it runs in the engine and in the process that tries grammars out.
"""

from __future__ import annotations

import json
from collections.abc import Sequence

import msgspec
from llguidance import LLMatcher, LLParserLimits, LLTokenizer, regex_to_lark
from llguidance.gbnf_to_lark import any_to_lark

from engine.errors import InvalidRequest
from engine.json_schema import MAX_DEPTH, json_rule
from engine.sampling_params import MAX_STRUCTURE_CHARS, Structure

_MAX_ERROR_CHARS = 300


class Grammars:
    """Matchers for one tokenizer."""

    def __init__(
        self, tokenizer_json: str, *, vocab_size: int | None = None, eos_token_ids: Sequence[int] = ()
    ) -> None:
        """`tokenizer_json` as Hugging Face's tokenizers write it; masks have `vocab_size` tokens at least.

        Takes about a second. Raises `ValueError` for a tokenizer that llguidance does not take.
        """
        eos = list(eos_token_ids) or None
        try:
            self._tokenizer = LLTokenizer(tokenizer_json, n_vocab=vocab_size, eos_token=eos)
        except ValueError:  # it has more tokens than the model
            self._tokenizer = LLTokenizer(tokenizer_json, eos_token=eos)
        self._limits = LLParserLimits(max_lexer_states=20_000, verbose_errors=False)

    @property
    def vocab_size(self) -> int:
        return self._tokenizer.vocab_size

    def compile(self, structure: Structure) -> LLMatcher:
        """A matcher at the beginning of the text; its first mask has been computed.

        Raises `InvalidRequest` for what cannot be enforced. May take long, or need all memory: see `grammar_trial`.
        """
        matcher = LLMatcher(self._tokenizer, prepared(structure).source, log_level=0, limits=self._limits)
        if not matcher.is_error():
            matcher.compute_bitmask()
        if matcher.is_error():
            raise InvalidRequest(f"cannot be enforced: {why(matcher)}", param=structure.param)
        return matcher


def why(matcher: LLMatcher) -> str:
    """What went wrong, of one that is in error."""
    text = _first_line(matcher.get_error())
    return "no text satisfies it" if text.startswith("NoExtension") else text


def prepared(structure: Structure) -> Structure:
    """In llguidance's own words, which are compiled as they are; raises `InvalidRequest`."""
    if structure.kind == "llguidance":
        return structure
    if len(structure.source) > MAX_STRUCTURE_CHARS:
        raise InvalidRequest(f"at most {MAX_STRUCTURE_CHARS} characters", param=structure.param)
    try:
        source = _WORDS[structure.kind](structure.source, structure.param)
    except InvalidRequest:
        raise
    except RecursionError:
        raise InvalidRequest(f"nested more than {MAX_DEPTH} levels deep", param=structure.param) from None
    except ValueError as error:
        raise InvalidRequest(f"cannot be read: {_first_line(str(error))}", param=structure.param) from None
    if structure.prelude:
        first = {"lark_grammar": f"start: prelude @structure\n{structure.prelude}"}
        (second,) = json.loads(source)["grammars"]
        source = json.dumps({"grammars": [first, {"name": "structure", **second}]})
    return msgspec.structs.replace(structure, kind="llguidance", source=source, prelude="")


def _json(source: str, param: str) -> str:
    return _lark(f"start: {json_rule(json.loads(source), param)}")


def _regex(source: str, param: str) -> str:
    # \d, \w and \s of ASCII alone: what matches them so does in every dialect
    return LLMatcher.grammar_from_regex(regex_to_lark(source, "dws"))


def _choice(source: str, param: str) -> str:
    texts = msgspec.json.decode(source, type=list[str])
    if not texts:
        raise InvalidRequest("there must be a text to choose", param=param)
    return LLMatcher.grammar_from_regex("|".join(map(_literal, texts)))


def _literal(text: str) -> str:
    """A regex of exactly this text."""
    return "".join(c if c.isalnum() else f"\\x{{{ord(c):x}}}" for c in text)


def _grammar(source: str, param: str) -> str:
    if "::=" in source:
        try:
            source = any_to_lark(source)
        except Exception as error:  # it has a class of its own for what it does not take, and raises others too
            raise ValueError(str(error) or "not a grammar") from None
    return _lark(source)


def _lark(source: str) -> str:
    return json.dumps({"grammars": [{"lark_grammar": source}]})


_WORDS = {"json": _json, "regex": _regex, "choice": _choice, "grammar": _grammar}


def _first_line(text: str) -> str:
    line = text.strip().partition("\n")[0]
    return line if len(line) <= _MAX_ERROR_CHARS else line[:_MAX_ERROR_CHARS] + "..."
