"""How MMMU (arXiv 2311.16502) reads answers, by the rules of its authors' evaluation.

Of a question with choices the letter that an answer names last counts, of an open one whether any of its key phrases or
numbers is right. Where an answer names no choice its authors draw one; here it gets what that gives on average.
"""

from __future__ import annotations

import re
import string
from collections.abc import Sequence

_ENDS = (",", ".", "!", "?", ";", ":", "'")
_LONG = 5
"""An answer of more words is searched for the texts of the choices."""
_KEYS = ("could be ", "so ", "is ", "thus ", "therefore ", "final ", "answer ", "result ")
"""The shortest text behind one of these is what a sentence says; in the last sentence one behind ``=``, too."""
_NUMBERS = (
    r"-?\b\d{1,3}(?:,\d{3})+\b",  # with commas
    r"-?\d+(?:\.\d+)?[eE][+-]?\d+",  # with an exponent
    r"-?(?:\d+\.\d+|\.\d+|\d+\b)(?![eE][+-]?\d+)(?![,\d])",
)


def mmmu(given: str, answers: Sequence[str], choices: Sequence[str]) -> float:
    """1 if an answer is right, else 0; 1 / n if it names none of n choices.

    With ``choices``, which have the letters from A on, ``answers`` are letters; without, texts or numbers.
    """
    if not choices:
        return float(_open(given, answers))
    letter = chosen_letter(given, choices)
    return 1 / len(choices) if letter is None else float(letter in answers)


def chosen_letter(given: str, choices: Sequence[str]) -> str | None:
    """The letter that an answer names, None if there is none.

    That is the last one in brackets; without brackets the last one that stands as a word; in a longer answer without
    either the one whose text comes last.
    """
    for end in _ENDS:
        given = given.strip(end)
    given = f" {given} "
    letters = string.ascii_uppercase[: len(choices)]
    places = {letter: given.rfind(f"({letter})") for letter in letters}
    if max(places.values()) < 0:
        places = {letter: given.rfind(f" {letter} ") for letter in letters}
    if max(places.values()) < 0 and len(given.split()) > _LONG:
        places = {letter: given.lower().rfind(text.lower()) for letter, text in zip(letters, choices, strict=True)}
    return None if max(places.values()) < 0 else max(letters, key=places.__getitem__)


def _open(given: str, answers: Sequence[str]) -> bool:
    """Whether a key phrase holds a right text, or one of the numbers is right to two places."""
    right = [form for answer in answers for form in _forms(answer)]
    phrases = _key_phrases(given)
    said = phrases + [number for phrase in phrases for pattern in _NUMBERS for number in re.findall(pattern, phrase)]
    texts = [form for form in right if isinstance(form, str)]
    for form in {form for text in said for form in _forms(text)}:
        if any(text in form for text in texts) if isinstance(form, str) else form in right:
            return True
    return False


def _key_phrases(given: str) -> list[str]:
    """What the lines of an answer say, in lower case; all of it if none has a key word.

    Its authors split at sentences as well, but only before a capital letter and after lowering the case: not at all.
    """
    whole = given.strip().strip(".").lower()
    lines, phrases = whole.split("\n"), []
    for number, line in enumerate(lines, 1):
        keys = (*_KEYS, "=") if number == len(lines) else _KEYS
        behind = [line.split(key)[-1].strip() for key in keys if key in line]
        shortest = _shortest(behind)
        if shortest and shortest not in _ENDS:
            phrases.append(shortest)
    return phrases or [whole]


def _shortest(texts: Sequence[str]) -> str:
    """The first of the shortest; an empty one gives way to whatever comes behind it."""
    found = ""
    for text in texts:
        if not found or len(text) < len(found):
            found = text
    return found


def _forms(text: str) -> list[str | float]:
    """A number as one, to two places; other text in lower case, a single letter only beside a space."""
    text = text.strip()
    try:
        return [round(float(text.replace(",", "")), 2)]
    except ValueError:
        lowered = text.lower()
        return [f" {lowered}", f"{lowered} "] if len(lowered) == 1 else [lowered]
