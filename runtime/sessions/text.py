"""Token ids to text, piece by piece: whole characters only, and never a part of a stop string."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from vkvx.errors import InputError

REPLACEMENT = "\ufffd"
"""What a tokenizer puts where bytes do not (yet) form a character."""


def check_text(text: object, what: str) -> None:
    """Raise InputError unless it is text that has a form in UTF-8: lone surrogates come from bytes that were none."""
    if not isinstance(text, str):
        raise InputError(f"{what} must be a string, got {type(text).__name__}")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        reason = f"{error.reason} at character {error.start}"
        raise InputError(f"{what} is not valid Unicode ({reason}); give text in UTF-8") from None


class IncrementalDecoder:
    """Turns token ids into text as they come.

    ``decode`` maps ids to text. A tokenizer's text for a token depends on its neighbours (spaces, bytes of one
    character), so each piece is the difference of two decodings that start a little before it. Text that ends in an
    incomplete character is held back until the character is complete.
    """

    def __init__(self, decode: Callable[[Sequence[int]], str]) -> None:
        self._decode = decode
        self._tokens: list[int] = []
        self._start = 0  # where both decodings start
        self._done = 0  # tokens whose text is out

    def push(self, token: int) -> str:
        """Text that this token completes, maybe none."""
        self._tokens.append(token)
        text = self._pending()
        if not text or text.endswith(REPLACEMENT):
            return ""
        self._start, self._done = self._done, len(self._tokens)
        return text

    def flush(self) -> str:
        """The text held back, with replacement characters for incomplete bytes."""
        text = self._pending()
        self._start = self._done = len(self._tokens)
        return text

    def _pending(self) -> str:
        before = self._decode(self._tokens[self._start : self._done])
        return self._decode(self._tokens[self._start :])[len(before) :]


class StopStrings:
    """Passes text on up to the first stop string, and holds back what could be the beginning of one.

    The stop string that is complete first ends the text, whatever pieces the text comes in; of those complete at the
    same character the longest counts.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = tuple(stops)
        self._held = ""
        self.found: str | None = None
        """The stop string that ended the text."""

    def push(self, text: str) -> str:
        """Text that may go out. After a stop string was found this is always empty."""
        if self.found is not None:
            return ""
        held = self._held + text
        ends = [(at + len(stop), at, stop) for stop in self._stops if (at := held.find(stop)) >= 0]
        if ends:
            _, at, self.found = min(ends)
            self._held = ""
            return held[:at]
        keep = max((_overlap(held, stop) for stop in self._stops), default=0)
        self._held = held[len(held) - keep :]
        return held[: len(held) - keep]

    def flush(self) -> str:
        """The text held back: what looked like a stop string was none."""
        text, self._held = self._held, ""
        return text


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of ``text`` that begins ``stop`` without being all of it."""
    return next((size for size in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:size])), 0)
