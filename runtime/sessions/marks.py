"""Marks in prompts: special tokens and placeholders; and text that looks like one, which stays text.

In a raw prompt a mark counts wherever it stands. A backslash behind its first character, as in ``<\\image>``, makes
text of it; one backslash there is taken away. So one more backslash makes any text literal, whatever stands around it.
"""

from __future__ import annotations

import copy
import re
import secrets
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

from vkvx.errors import InputError

_SECRET = f"{secrets.randbelow(10**18):018}"
"""In what nobody shall be able to write: it is another in each process."""
_BREAK = f"\ue000{_SECRET}\ue001"
"""Stands in text of a user while a chat template works on it."""


@dataclass(frozen=True)
class Split:
    """A raw prompt: ``texts`` [n + 1], ``marks`` [n] between them, and which marks the texts hold as ``literals``."""

    texts: list[str]
    marks: list[str]
    literals: frozenset[str]


class Marks:
    """The marks of one model, of two characters or more."""

    def __init__(self, names: Iterable[str]) -> None:
        longest_first = sorted({name for name in names if len(name) > 1}, key=lambda name: (-len(name), name))
        self._pattern = re.compile(
            "|".join(rf"{re.escape(m[0])}\\*{re.escape(m[1:])}" for m in longest_first) or "(?!)"
        )
        self._beginnings = {name[:size] for name in longest_first for size in range(1, len(name))}
        self._ends = {name[size:] for name in longest_first for size in range(1, len(name))}
        self._longest = max(map(len, longest_first), default=1) - 1

    def split(self, prompt: str) -> Split:
        """A raw prompt at its marks, without the backslashes of what is text."""
        texts, marks, literals, done = [""], [], set(), 0
        for found in self._pattern.finditer(prompt):
            texts[-1] += prompt[done : found.start()]
            done = found.end()
            written = found[0]
            mark = written[0] + written[1:].lstrip("\\")
            if written == mark:
                marks.append(mark)
                texts.append("")
            else:
                literals.add(mark)
                texts[-1] += written[0] + written[2:]
        texts[-1] += prompt[done:]
        return Split(texts, marks, frozenset(literals))

    def escape(self, text: str) -> str:
        """Text for a raw prompt in which nothing is a mark."""
        return self._pattern.sub(lambda found: f"{found[0][0]}\\{found[0][1:]}", text)

    def guard(self, text: str) -> str:
        """Text for a chat template: with a break in each mark, and in what becomes one beside the right text.

        That may stand at either end, beside blanks that a template takes away. :meth:`settle` takes out the breaks.
        """
        core, left = text.strip(), len(text) - len(text.lstrip())
        places = {found.start() + 1 for found in self._pattern.finditer(text)}
        for size in range(1, min(self._longest, len(core)) + 1):
            if core[-size:] in self._beginnings:
                places.add(left + len(core) - size + 1)
            if core[:size] in self._ends:
                places.add(left + size - 1)
        ordered = sorted(places)
        return _BREAK.join(text[a:b] for a, b in zip([0, *ordered], [*ordered, len(text)], strict=True))

    def settle(self, text: str) -> str:
        """What a chat template made of guarded text, as a raw prompt: marks with a break in them are escaped."""
        parts = text.split(_BREAK)
        broken = set(accumulate(map(len, parts[:-1])))

        def write(found: re.Match[str]) -> str:
            is_text = any(place in broken for place in range(found.start() + 1, found.end()))
            return f"{found[0][0]}\\{found[0][1:]}" if is_text else found[0]

        return self._pattern.sub(write, "".join(parts))


class LiteralTokenizer:
    """A copy of a Rust tokenizer that takes special tokens for text, unless they are written by :meth:`special`.

    A special token gets a second name, with the same rules for the blanks around it. All else is as in the original, so
    what stands beside it becomes the same tokens.
    """

    def __init__(self, tokenizer: Any, special: Mapping[int, Any]) -> None:
        """``special`` are the added tokens that shall be text, by their ids. Raises InputError if there is no copy."""
        from tokenizers import AddedToken

        backend = getattr(tokenizer, "backend_tokenizer", None)
        if backend is None:
            raise InputError(f"this model's tokenizer ({type(tokenizer).__name__}) cannot keep special tokens as text")
        self._backend = copy.deepcopy(backend)
        self._backend.no_padding()
        self._backend.no_truncation()
        self._names = {token.content: f"\ue000{_SECRET}-{number}\ue001" for number, token in special.items()}
        self._pattern = re.compile("|".join(map(re.escape, sorted(self._names, key=len, reverse=True))) or "(?!)")
        # Known as special, so that the setting below holds for them, also where the checkpoint has forgotten that.
        self._backend.add_special_tokens([_renamed(AddedToken, token, token.content) for token in special.values()])
        self._backend.encode_special_tokens = True
        self._backend.add_tokens([_renamed(AddedToken, t, self._names[t.content]) for t in special.values()])
        self._ids = {self._backend.token_to_id(self._names[token.content]): n for n, token in special.items()}

    def special(self, text: str) -> str:
        """Text in which special tokens count."""
        return self._pattern.sub(lambda found: self._names[found[0]], text)

    def __call__(self, text: str, add_special_tokens: bool) -> list[int]:
        """Token ids of a text."""
        ids = self._backend.encode(text, add_special_tokens=add_special_tokens).ids
        return [self._ids.get(token, token) for token in ids]


def _renamed(kind: Any, token: Any, name: str) -> Any:
    """An added token under this name; special, so that it is taken for text, only under its own."""
    rules = {rule: getattr(token, rule) for rule in ("single_word", "lstrip", "rstrip", "normalized")}
    return kind(name, special=name == token.content, **rules)
