from __future__ import annotations

from collections.abc import Sequence

import pytest

from engine.detokenizer import Detokenizer


class ByteDecoder:
    """Each token is a byte; 256 is special."""

    def decode(self, token_ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        parts = bytes(i for i in token_ids if i < 256).decode("utf-8", errors="replace")
        return parts if skip_special_tokens or 256 not in token_ids else parts + "<end>"


def feed(text: str | bytes, **kwargs: object) -> tuple[list[str], Detokenizer]:
    detokenizer = Detokenizer(ByteDecoder(), list(b"prompt"), **kwargs)  # type: ignore[arg-type]
    pieces = []
    for byte in text.encode() if isinstance(text, str) else text:
        pieces.append(detokenizer.push(byte))
        if detokenizer.stop_string is not None:
            break
    return [*pieces, detokenizer.flush()], detokenizer


@pytest.mark.parametrize(
    "text", ["plain", "naïve café", "日本語のテキスト", "👩‍👩‍👧‍👦 family", "mixed ß 語 👍 end", ""]
)
def test_pieces_join_to_the_text_and_none_holds_half_a_character(text: str):
    pieces, _ = feed(text)
    assert "".join(pieces) == text
    assert all("\ufffd" not in piece for piece in pieces)


def test_a_character_comes_with_its_last_byte():
    pieces, _ = feed("é!")
    assert pieces == ["", "é", "!", ""]


def test_bytes_that_never_become_a_character_are_shown_as_replacement_not_lost():
    pieces, _ = feed(b"a\xff\xfe\xfd\xfcb\xe2\x82")
    assert "".join(pieces).count("\ufffd") >= 4
    assert "".join(pieces).replace("\ufffd", "") == "ab"


@pytest.mark.parametrize(
    ("text", "stop", "expected", "found"),
    [
        ("hello world", ["wor"], "hello ", "wor"),
        ("hello world", ["xyz"], "hello world", None),
        ("aab", ["ab"], "a", "ab"),
        ("abcabd", ["abd"], "abc", "abd"),
        ("one\n\ntwo", ["\n\n"], "one", "\n\n"),
        ("first second", ["second", "first"], "", "first"),
        ("ends with wo", ["world"], "ends with wo", None),
        ("überall", ["be"], "ü", "be"),
        ("prompt again", ["tp"], "prompt again", None),
    ],
)
def test_text_ends_before_a_stop_string_and_no_part_of_one_gets_out(
    text: str, stop: list[str], expected: str, found: str | None
):
    pieces, detokenizer = feed(text, stop=stop)
    assert "".join(pieces) == expected
    assert detokenizer.stop_string == found


def test_what_may_become_a_stop_string_is_held_back_until_it_is_clear():
    pieces, _ = feed("a END", stop=["END."])
    assert pieces == ["a", " ", "", "", "", "END"]


def test_stop_strings_are_let_through_until_stopping_is_allowed():
    detokenizer = Detokenizer(ByteDecoder(), [], stop=["b"])
    text = "".join(detokenizer.push(byte, may_stop=i > 2) for i, byte in enumerate(b"abcab"))
    assert text == "abca"
    assert detokenizer.stop_string == "b"


def test_special_tokens_are_shown_only_if_asked_for():
    for skip, expected in ((True, ""), (False, "<end>")):
        detokenizer = Detokenizer(ByteDecoder(), [], skip_special_tokens=skip)
        assert detokenizer.push(256) + detokenizer.flush() == expected
