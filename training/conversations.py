"""Conversations to train on: the token ids of a few turns about one page, two pages or none, a batch a step."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
from torch.utils.data import Dataset
from transformers import PreTrainedTokenizerFast

from training.forms import Form, Layout
from training.pages import mark_code
from vkvx.models.tiny_llava import data

IGNORED = -100
"""The label of a token that the model need not predict."""
TURNS = 3
TEXT_ONE, TEXT_TWO = 104, 136
"""Room for the text of a conversation about one page and about two."""

PageRecord = tuple[np.ndarray, tuple[data.Mark, ...]]
Turn = tuple[str, str, int]
"""A question, its answer, and how many pictures the question brings along."""


@dataclass(frozen=True)
class Asker:
    """Asks about pages the kinds of question of a form."""

    kinds: tuple[str, ...]
    shares: np.ndarray

    @classmethod
    def of(cls, form: Form) -> Asker:
        """With the form's kinds."""
        weights = np.array(list(form.kinds.values()))
        return cls(tuple(form.kinds), np.cumsum(weights / weights.sum()))

    def ask(self, record: PageRecord, rng: np.random.Generator, images: int = 0, name: str = "page") -> Turn:
        """One question."""
        kind = self.kinds[min(int(np.searchsorted(self.shares, rng.random())), len(self.kinds) - 1)]
        return (*data.question(*record, kind, rng, name), images)

    def about_one(self, record: PageRecord, rng: np.random.Generator) -> list[Turn]:
        """A few questions about one page; now and then a question without a picture comes first."""
        talk: list[Turn] = [(*data.text_question(rng), 0)] if rng.random() < 0.06 else []
        return talk + [self.ask(record, rng, images=int(i == 0)) for i in range(TURNS)]

    def about_two(self, first: PageRecord, second: PageRecord, rng: np.random.Generator) -> list[Turn]:
        """Two pages, both at once or the second in a later turn, where "the page" means the one just shown."""
        names = {"first page": first, "second page": second}
        picked = [("first page", "second page")[int(rng.integers(2))] for _ in range(TURNS)]
        if rng.random() < 0.5:
            return [self.ask(names[name], rng, images=2 * (i == 0), name=name) for i, name in enumerate(picked)]
        later = "page" if rng.random() < 0.5 else "second page"
        talk = [self.ask(first, rng, images=1), self.ask(second, rng, images=1, name=later)]
        return talk + [self.ask(names[name], rng, name=name) for name in picked[2:]]


def about_none(rng: np.random.Generator) -> list[Turn]:
    """Questions that need no picture."""
    return [(*data.text_question(rng), 0) for _ in range(TURNS)]


class Encoder:
    """Turns conversations into padded arrays of ids, labels and positions."""

    def __init__(self, form: Form, tokenizer: PreTrainedTokenizerFast) -> None:
        self.form, self.pad = form, tokenizer.pad_token_id
        self.begin = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
        self.image = tokenizer.convert_tokens_to_ids(form.image)
        encode: Callable[[str], list[int]] = lambda text: tokenizer.encode(text, add_special_tokens=False)  # noqa: E731
        self._encode = lru_cache(maxsize=65536)(encode)
        self._letters = {letter: encode(letter)[0] for letter in "0123456789\n"}

    def _answer(self, answer: str) -> list[int]:
        """Digits and line ends are tokens by themselves, so that pages need not be looked up."""
        if all(letter in self._letters for letter in answer):
            return [*self._encode(self.form.lead), *(self._letters[letter] for letter in answer)]
        return self._encode(self.form.lead + answer)

    def __call__(
        self, talks: list[list[Turn]], length: int, layout: Layout
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Ids and labels, int64 [conversations, length], and positions, int64 [1 or 3, conversations, length].

        Only answers and the end-of-turn after them are labels, which are not shifted. What exceeds the length is cut
        off.
        """
        ids = np.full((len(talks), length), self.pad, dtype=np.int64)
        labels = np.full((len(talks), length), IGNORED, dtype=np.int64)
        end = self._encode(self.form.eos)
        between = self._encode(self.form.after)
        for row, talk in enumerate(talks):
            tokens, targets = list(self.begin), [IGNORED] * len(self.begin)
            for prompt, answer, images in talk:
                asked: list[int] = []
                for token in self._encode(self.form.turn(prompt, images)):
                    asked += [token] * (layout.tokens if token == self.image else 1)
                answered = self._answer(answer) + end
                tokens += asked + answered + between
                targets += [IGNORED] * len(asked) + answered + [IGNORED] * len(between)
            ids[row, : len(tokens)] = tokens[:length]
            labels[row, : len(targets)] = targets[:length]
        return ids, labels, self._positions(ids, layout)

    def _positions(self, ids: np.ndarray, layout: Layout) -> np.ndarray:
        """One after another; where positions are wide, a picture takes as many as its longer side."""
        length = ids.shape[1]
        if not self.form.wide_positions:
            return np.arange(length)[None, None]
        across = layout.grid[1]
        visual = ids == self.image
        rank = np.cumsum(visual, 1) - 1  # of a visual token among those of its row
        inside, picture = rank % layout.tokens, rank // layout.tokens
        # A picture of T tokens moves what follows by max(down, across) instead of T.
        before = np.where(visual, picture, picture + 1).clip(min=0)
        start = np.arange(length)[None] - np.where(visual, inside, 0) - before * (layout.tokens - max(layout.grid))
        place = np.stack([np.zeros_like(inside), inside // across, inside % across])
        return start[None] + np.where(visual, place, 0)


class Step(NamedTuple):
    """What the host prepares for a step; pages are drawn from it on the device."""

    layout: int  # number in the form's layouts
    pictures: int  # of a conversation: 1 or 2
    ids: np.ndarray  # int64 [rows, length]
    labels: np.ndarray  # int64 [rows, length], not shifted
    positions: np.ndarray  # int64 [1 or 3, rows or 1, length]
    places: np.ndarray  # int64 [pages * T]: where in the flattened ids the visual tokens stand
    drawn: np.ndarray  # int64 [pages, R, C]: numbers of handwritten digits
    marks: np.ndarray  # int64 [pages, R, C], see `pages.mark_code`


class Steps(Dataset):
    """The steps of a training run by their numbers: the same ones for the same seed."""

    def __init__(self, form: Form, tokenizer: PreTrainedTokenizerFast, seed: int, batch: int, steps: int) -> None:
        self.form, self.seed, self.batch, self.steps = form, seed, batch, steps
        self.encoder, self.asker = Encoder(form, tokenizer), Asker.of(form)
        _, self.labels, _ = data.handwriting("train")
        self.shares = np.cumsum([layout.share for layout in form.layouts])

    def __len__(self) -> int:
        return self.steps

    def __getitem__(self, step: int) -> Step:
        """Mostly conversations about one page; one step in six is about two pages and one row in 32 about none."""
        rng = np.random.default_rng((self.seed, step))
        number = min(int(np.searchsorted(self.shares, rng.random())), len(self.shares) - 1)
        layout, two = self.form.layouts[number], rng.random() < 1 / 6
        rows = max(1, self.batch * 2 // 5) if two else self.batch
        none = 0 if two else rows // 32
        pages = 2 * rows if two else rows - none
        drawn = rng.integers(len(self.labels), size=(pages, layout.rows, layout.columns))
        marks = [self._marks(layout, rng) for _ in range(pages)]
        records = list(zip(self.labels[drawn], marks, strict=True))
        if two:
            talks = [self.asker.about_two(records[2 * i], records[2 * i + 1], rng) for i in range(rows)]
        else:
            talks = [self.asker.about_one(record, rng) for record in records]
            talks += [about_none(rng) for _ in range(none)]
        length = 2 * layout.tokens + TEXT_TWO if two else layout.tokens + TEXT_ONE
        ids, labels, positions = self.encoder(talks, -(-length // 8) * 8, layout)
        codes = np.zeros(drawn.shape, np.int64)
        for page, listed in enumerate(marks):
            for mark in listed:
                codes[page, mark.row, mark.column] = mark_code(mark)
        places = np.flatnonzero(ids == self.encoder.image)
        return Step(number, 1 + two, ids, labels, positions, places, drawn, codes)

    def _marks(self, layout: Layout, rng: np.random.Generator) -> tuple[data.Mark, ...]:
        """Those of a whole page that lie on the part that is shown."""
        marks = data.draw_marks(rng)
        return tuple(mark for mark in marks if mark.row < layout.rows and mark.column < layout.columns)


def first(batch: list[Any]) -> Any:
    """A loader's batch of one, as it is."""
    return batch[0]
