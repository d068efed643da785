"""Text out of tokens, piece by piece."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vkvx.errors import InputError
from vkvx.runtime.sessions.text import IncrementalDecoder, StopStrings, check_text


def byte_decode(tokens: Sequence[int]) -> str:
    return bytes(tokens).decode(errors="replace")


def word_decode(tokens: Sequence[int]) -> str:
    """Like SentencePiece: words carry a space before them, which falls away at the start."""
    return "".join(f" w{token}" for token in tokens).lstrip()


def test_waits_for_whole_characters() -> None:
    decoder = IncrementalDecoder(byte_decode)
    pieces = [decoder.push(byte) for byte in "aé€🙂".encode()]
    assert pieces == ["a", "", "é", "", "", "€", "", "", "", "🙂"]
    assert decoder.flush() == ""


@given(st.text())
def test_whole_text_arrives(text: str) -> None:
    decoder = IncrementalDecoder(byte_decode)
    assert "".join(decoder.push(byte) for byte in text.encode()) + decoder.flush() == text


@given(st.binary())
def test_broken_bytes_come_out_replaced(data: bytes) -> None:
    decoder = IncrementalDecoder(byte_decode)
    text = "".join(decoder.push(byte) for byte in data) + decoder.flush()
    assert text == data.decode(errors="replace")


@given(st.lists(st.integers(0, 9)))
def test_spaces_between_words_are_kept(tokens: list[int]) -> None:
    decoder = IncrementalDecoder(word_decode)
    assert "".join(decoder.push(token) for token in tokens) == word_decode(tokens)


def test_the_end_of_a_broken_character_is_flushed_once() -> None:
    decoder = IncrementalDecoder(byte_decode)
    assert [decoder.push(byte) for byte in "é".encode()[:1]] == [""]
    assert decoder.flush() == "\ufffd"
    assert decoder.flush() == ""


def test_stop_string_over_several_pieces() -> None:
    stops = StopStrings(["###", "END"])
    assert [stops.push(piece) for piece in ("a#", "#b", "E", "N", "x##", "#y", "z")] == [
        "a",
        "##b",
        "",
        "",
        "ENx",
        "",
        "",
    ]
    assert stops.found == "###"
    assert stops.flush() == ""


def test_what_looked_like_a_stop_string_is_flushed() -> None:
    stops = StopStrings(["stop"])
    assert stops.push("a sto") == "a "
    assert stops.flush() == "sto"
    assert stops.found is None


def test_the_first_complete_one_counts() -> None:
    for pieces in (["xabcd"], ["xa", "bc", "d"], list("xabcd")):
        stops = StopStrings(["abcd", "bc", "c"])
        assert "".join(stops.push(piece) for piece in pieces) == "xa"
        assert stops.found == "bc"


@given(st.text("ab#"), st.lists(st.text("ab#", min_size=1, max_size=4), max_size=3), st.randoms())
def test_pieces_do_not_matter_and_stops_never_show(text: str, strings: list[str], random) -> None:  # type: ignore[no-untyped-def]
    whole = StopStrings(strings)
    expected = whole.push(text)
    if whole.found is None:
        expected += whole.flush()
        assert expected == text
    stops, out, at = StopStrings(strings), "", 0
    while at < len(text):
        size = random.randint(1, 3)
        out += stops.push(text[at : at + size])
        at += size
        assert not any(stop in out for stop in strings)
    if stops.found is None:
        out += stops.flush()
    assert (out, stops.found) == (expected, whole.found)


@pytest.mark.parametrize("text", ["\udc80", "a\ud800b", 7, None, b"bytes"])
def test_what_is_no_text_is_refused(text: object) -> None:
    with pytest.raises(InputError, match=r"^a prompt (is not valid Unicode|must be a string)"):
        check_text(text, "a prompt")
    check_text("fine: \U0001f600 \ufffd", "a prompt")
