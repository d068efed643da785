"""Conversations to train on: the token ids of a few turns about one page, two pages or none."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache

import numpy as np
from transformers import PreTrainedTokenizerFast

from training.tiny_llava import model
from vkvx.models.tiny_llava import data

VISUAL = (data.SIZE // 14) ** 2
IGNORED = -100
"""The label of a token that the model need not predict."""

_WEIGHTS = np.array([0.34, 0.16, 0.14, 0.12, 0.06, 0.09, 0.09])  # of data.KINDS
_SHARES = np.cumsum(_WEIGHTS / _WEIGHTS.sum())

PageRecord = tuple[np.ndarray, tuple[data.Mark, ...]]
Turn = tuple[str, str, int]
"""A question, its answer, and how many pictures the question brings along."""


def _ask(record: PageRecord, rng: np.random.Generator, images: int = 0, name: str = "page") -> Turn:
    kind = data.KINDS[int(np.searchsorted(_SHARES, rng.random()))]
    return (*data.question(*record, kind, rng, name), images)


def about_one(record: PageRecord, rng: np.random.Generator, turns: int = 3) -> list[Turn]:
    """A few questions about one page; now and then a question without a picture comes first."""
    talk: list[Turn] = [(*data.text_question(rng), 0)] if rng.random() < 0.06 else []
    return talk + [_ask(record, rng, images=int(i == 0)) for i in range(turns)]


def about_two(first: PageRecord, second: PageRecord, rng: np.random.Generator, turns: int = 3) -> list[Turn]:
    """Two pages, both at once or the second in a later turn, where "the page" means the one just shown."""
    names = {"first page": first, "second page": second}
    picked = [("first page", "second page")[int(rng.integers(2))] for _ in range(turns)]
    if rng.random() < 0.5:
        return [_ask(names[name], rng, images=2 * (i == 0), name=name) for i, name in enumerate(picked)]
    later = "page" if rng.random() < 0.5 else "second page"
    talk = [_ask(first, rng, images=1), _ask(second, rng, images=1, name=later)]
    return talk + [_ask(names[name], rng, name=name) for name in picked[2:]]


def about_none(rng: np.random.Generator, turns: int = 3) -> list[Turn]:
    """Questions that need no picture."""
    return [(*data.text_question(rng), 0) for _ in range(turns)]


class Encoder:
    """Turns conversations into padded arrays of ids and labels."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast) -> None:
        self.bos, self.pad = tokenizer.bos_token_id, tokenizer.pad_token_id
        self.image = tokenizer.convert_tokens_to_ids(model.IMAGE)
        encode: Callable[[str], list[int]] = lambda text: tokenizer.encode(text, add_special_tokens=False)  # noqa: E731
        self._encode = lru_cache(maxsize=65536)(encode)

    def __call__(self, talks: list[list[Turn]], length: int) -> tuple[np.ndarray, np.ndarray]:
        """Ids and labels, int64 [conversations, length]: only answers and the end-of-turn after them are labels.

        Labels are not shifted. What exceeds the length is cut off.
        """
        ids = np.full((len(talks), length), self.pad, dtype=np.int64)
        labels = np.full((len(talks), length), IGNORED, dtype=np.int64)
        for row, talk in enumerate(talks):
            tokens, targets = [self.bos], [IGNORED]
            for prompt, answer, images in talk:
                asked = []
                for token in self._encode(model.turn(prompt, images)):
                    asked += [token] * (VISUAL if token == self.image else 1)
                answered = self._encode(f" {answer}{model.EOS}")
                tokens += asked + answered
                targets += [IGNORED] * len(asked) + answered
            ids[row, : len(tokens)] = tokens[:length]
            labels[row, : len(targets)] = targets[:length]
        return ids, labels
