"""Pages of real handwritten digits, and questions about them.

A page is a 336 x 336 picture of 4 rows and 6 columns of digits; some cells carry a coloured mark. The digits are
drawn independently of each other, so nothing but the picture tells what stands in a cell: an answer can only be read,
not guessed. The handwriting is scikit-learn's copy of the UCI optical digits (1797 pictures of 8 x 8 pixels). They are
split by picture: no picture on a training page ever stands on a held-out one.

Needs numpy, pillow and scikit-learn, not torch.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

ROWS, COLUMNS, SIZE = 4, 6, 336
CELL_HEIGHT, CELL_WIDTH = SIZE // ROWS, SIZE // COLUMNS
SPLITS = ("train", "test")
COLOURS = {"red": (222, 44, 44), "green": (36, 160, 64), "blue": (48, 96, 232), "orange": (244, 150, 24)}
SHAPES = ("box", "line", "dot")
PARTS = ((ROWS, COLUMNS), (2, 6), (4, 3), (2, 3))
"""Rows and columns of the parts of pages that are shown where pictures may have any size."""
KINDS = ("transcribe", "row", "cell", "count", "marks", "where", "mark")
"""The kinds of question that `question` knows."""

_MARGIN = 2  # empty source pixels around a digit, so that strokes at its border are interpolated and not cut off


@dataclass(frozen=True)
class Mark:
    """A coloured mark; `row` and `column` count from 0."""

    row: int
    column: int
    colour: str
    shape: str


@dataclass(frozen=True)
class Page:
    """A picture (RGB) with what stands on it: `digits` is int64 [rows, columns], `marks` is in reading order.

    A whole page has 336 x 336 pixels, 4 rows and 6 columns.
    """

    image: Image.Image
    digits: np.ndarray
    marks: tuple[Mark, ...]


@cache
def handwriting(split: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The digits of a split: pictures uint8 [n, 12, 12] (0 is paper), labels int64 [n], indices in scikit-learn's set.

    One picture in five of each class, chosen by a fixed permutation, is held out as "test".
    """
    if split not in SPLITS:
        raise ValueError(f"split is {split!r}, expected one of {', '.join(SPLITS)}")
    from sklearn.datasets import load_digits  # slow to import, and only needed once pages are made

    source = load_digits()
    order = np.random.default_rng(20240229).permutation(len(source.target))
    held_out = np.zeros(len(order), dtype=bool)
    for digit in range(10):
        held_out[order[source.target[order] == digit][::5]] = True
    chosen = np.flatnonzero(held_out if split == "test" else ~held_out)
    pictures = np.pad(source.images[chosen], ((0, 0), (_MARGIN, _MARGIN), (_MARGIN, _MARGIN)))
    return np.rint(pictures * (255 / 16)).astype(np.uint8), source.target[chosen].astype(np.int64), chosen


def page(seed: int, split: str) -> Page:
    """The page of a seed. The same seed always gives the same page, and the two splits share no handwriting.

    Training pages are distorted somewhat more than held-out ones (1.4 times the range), as there are few pictures to
    learn from.
    """
    pictures, labels, _ = handwriting(split)
    rng = np.random.default_rng((seed, SPLITS.index(split)))
    drawn = rng.integers(len(labels), size=ROWS * COLUMNS)
    marks = draw_marks(rng)
    paper = _paper(rng, marks)
    ink, coverage = _strokes(rng, pictures[drawn], strength=1.4 if split == "train" else 1.0)
    colour = np.repeat(np.repeat(ink, CELL_HEIGHT, axis=0), CELL_WIDTH, axis=1)
    picture = paper + (colour - paper) * coverage[..., None]
    light = rng.uniform(-12, 12, size=2).astype(np.float32)  # from top to bottom, from left to right
    ramp = np.linspace(-1, 1, SIZE, dtype=np.float32)
    grain = rng.standard_normal((SIZE, SIZE), dtype=np.float32) * np.float32(rng.uniform(0.5, 5))
    picture += (grain + light[0] * ramp[:, None] + light[1] * ramp)[..., None]
    image = Image.fromarray(np.clip(picture, 0, 255).astype(np.uint8))
    return Page(image, labels[drawn].reshape(ROWS, COLUMNS), marks)


def crop(page: Page, rows: int, columns: int) -> Page:
    """The top left part of a page, so many rows and columns of it."""
    marks = tuple(mark for mark in page.marks if mark.row < rows and mark.column < columns)
    part = page.image.crop((0, 0, columns * CELL_WIDTH, rows * CELL_HEIGHT))
    return Page(part, page.digits[:rows, :columns], marks)


def draw_marks(rng: np.random.Generator) -> tuple[Mark, ...]:
    """Two to eight marks in different cells."""
    cells = np.sort(rng.choice(ROWS * COLUMNS, size=rng.integers(2, 9), replace=False))
    colours, names = rng.integers(len(COLOURS), size=len(cells)), tuple(COLOURS)
    shapes = rng.integers(len(SHAPES), size=len(cells))
    return tuple(
        Mark(int(cell) // COLUMNS, int(cell) % COLUMNS, names[colour], SHAPES[shape])
        for cell, colour, shape in zip(cells, colours, shapes, strict=True)
    )


def _paper(rng: np.random.Generator, marks: Sequence[Mark]) -> np.ndarray:
    """Tinted paper with its marks, float32 [336, 336, 3]."""
    tint = np.clip(rng.uniform(205, 252) + rng.uniform(-12, 12, size=3), 0, 255)
    image = Image.new("RGB", (SIZE, SIZE), tuple(int(value) for value in tint))
    draw = ImageDraw.Draw(image)
    for mark in marks:
        shade = np.clip(np.add(COLOURS[mark.colour], rng.integers(-18, 19, size=3)), 0, 255)
        fill = tuple(int(value) for value in shade)
        left, top = mark.column * CELL_WIDTH, mark.row * CELL_HEIGHT
        dx, dy = (int(value) for value in rng.integers(-2, 3, size=2))
        width = int(rng.integers(3, 6))
        if mark.shape == "box":
            corner = (left + CELL_WIDTH - 4 + dx, top + CELL_HEIGHT - 4 + dy)
            draw.rectangle((left + 3 + dx, top + 3 + dy, *corner), outline=fill, width=width)
        elif mark.shape == "line":
            at = top + CELL_HEIGHT - 9 + dy
            draw.rectangle((left + 8 + dx, at, left + CELL_WIDTH - 8 + dx, at + width), fill=fill)
        else:
            x, y, radius = left + CELL_WIDTH - 11 + dx, top + 12 + dy, width + 2
            draw.ellipse((x - radius, y - radius, x + radius, y + radius), fill=fill)
    return np.asarray(image, dtype=np.float32)


def _strokes(rng: np.random.Generator, pictures: np.ndarray, strength: float) -> tuple[np.ndarray, np.ndarray]:
    """Colours of the ink, float32 [4, 6, 3], and how much of each pixel it covers, float32 [336, 336] in 0..1.

    Each digit is scaled, rotated, sheared, moved and warped: the corners of its cell are mapped back to places in the
    12 x 12 source, each place is shifted a little, and pillow interpolates the quadrilateral in between.
    """
    count = len(pictures)
    angle = np.deg2rad(rng.uniform(-11, 11, size=count) * strength)
    scale = rng.uniform(4.9, 6.1, size=(count, 2)) * rng.uniform(0.92, 1.04, size=(count, 1))  # pixels a source pixel
    shear = rng.uniform(-0.13, 0.13, size=count) * strength
    move = rng.uniform(-1, 1, size=(count, 2)) * (4.0, 9.0)
    corners = np.array([(0, 0), (0, CELL_HEIGHT), (CELL_WIDTH, CELL_HEIGHT), (CELL_WIDTH, 0)], dtype=np.float64)
    offset = corners - (CELL_WIDTH / 2, CELL_HEIGHT / 2) - move[:, None, :]
    cos, sin = np.cos(angle)[:, None], np.sin(angle)[:, None]
    x = (cos * offset[..., 0] + sin * offset[..., 1]) / scale[:, :1]
    y = (cos * offset[..., 1] - sin * offset[..., 0]) / scale[:, 1:]
    quads = np.stack((x + shear[:, None] * y, y), axis=-1) + pictures.shape[-1] / 2
    quads += rng.uniform(-0.5, 0.5, size=quads.shape) * strength

    cells = np.empty((count, CELL_HEIGHT, CELL_WIDTH), dtype=np.float32)
    for cell, picture, quad in zip(cells, pictures, quads, strict=True):
        source = Image.fromarray(picture)
        target, method = (CELL_WIDTH, CELL_HEIGHT), Image.Transform.QUAD
        cell[:] = np.asarray(source.transform(target, method, tuple(quad.ravel()), Image.Resampling.BICUBIC))
    # Stretching the grey values around their middle makes strokes thinner or thicker; darkness varies as pens do.
    low, high = np.array([(1.0, -0.16, 0.7), (2.2, 0.12, 1.0)], dtype=np.float32)
    gain, bias, darkness = rng.uniform(low, high, size=(count, 3)).astype(np.float32).T[:, :, None, None]
    half = np.float32(0.5)
    cells = np.clip((cells / np.float32(255) - half + bias) * gain + half, 0, 1) * (cells > 0) * darkness
    coverage = cells.reshape(ROWS, COLUMNS, CELL_HEIGHT, CELL_WIDTH).transpose(0, 2, 1, 3).reshape(SIZE, SIZE)
    ink = rng.uniform(0, 90, size=3) + rng.uniform(-25, 25, size=(ROWS, COLUMNS, 3))
    return np.clip(ink, 0, 110).astype(np.float32), coverage


def transcription(digits: np.ndarray) -> str:
    """Digits [rows, columns] as text, a line a row."""
    return "\n".join("".join(str(digit) for digit in row) for row in digits)


def right_digits(given: str, truth: str) -> float:
    """Share of the digits of the truth that stand at the same row and column in the given transcription."""
    read = {(r, c): d for r, line in enumerate(given.strip().split("\n")) for c, d in enumerate(line)}
    wanted = [((r, c), d) for r, line in enumerate(truth.split("\n")) for c, d in enumerate(line)]
    return sum(read.get(place) == digit for place, digit in wanted) / len(wanted)


def question(
    digits: np.ndarray, marks: Sequence[Mark], kind: str, rng: np.random.Generator, name: str = "page"
) -> tuple[str, str]:
    """A question of a kind in `KINDS` and its answer. Rows and columns count from 1 in the text.

    With several pictures `name` tells which one is meant: "first page" or "second page".
    """
    row, column = (int(rng.integers(size)) for size in digits.shape)
    colour, digit = tuple(COLOURS)[int(rng.integers(len(COLOURS)))], int(rng.integers(10))
    where = "" if name == "page" else f" of the {name}"
    on = "" if name == "page" else f" on the {name}"
    if kind == "transcribe":
        return f"Transcribe the {name}.", transcription(digits)
    if kind == "row":
        return f"Read row {row + 1}{where}.", transcription(digits[row : row + 1])
    if kind == "cell":
        return f"What stands at row {row + 1} column {column + 1}{where}?", str(digits[row, column])
    if kind == "count":
        return f"How many digits{on} are {digit}?", str(int((digits == digit).sum()))
    if kind == "marks":
        return f"How many marks{on} are {colour}?", str(sum(mark.colour == colour for mark in marks))
    if kind == "where":
        found = [f"{mark.row + 1},{mark.column + 1}" for mark in marks if mark.colour == colour]
        return f"Which cells{where} are {colour}?", " ".join(found) or "none"
    if kind == "mark":
        if marks and rng.random() < 0.75:  # most cells carry none: ask about the others more often
            mark = marks[int(rng.integers(len(marks)))]
            row, column = mark.row, mark.column
        here = [f"{mark.colour} {mark.shape}" for mark in marks if (mark.row, mark.column) == (row, column)]
        return f"Which mark is at row {row + 1} column {column + 1}{where}?", here[0] if here else "none"
    raise ValueError(f"kind is {kind!r}, expected one of {', '.join(KINDS)}")


def questions(page: Page, rng: np.random.Generator) -> list[tuple[str, str]]:
    """One question of each kind about a page, with its answer, in the order of `KINDS`."""
    return [question(page.digits, page.marks, kind, rng) for kind in KINDS]


def text_question(rng: np.random.Generator) -> tuple[str, str]:
    """A question that needs no picture."""
    digit = int(rng.integers(9))
    return (
        (f"Which digit comes after {digit}?", str(digit + 1)),
        (f"Which digit comes before {digit + 1}?", str(digit)),
        ("How many rows has a page?", str(ROWS)),
        ("How many columns has a page?", str(COLUMNS)),
        ("Which colours are there?", " ".join(COLOURS)),
        ("What can you do?", "Read pages of digits."),
    )[int(rng.integers(6))]


def write_samples(folder: Path, count: int = 4) -> None:
    """Write the first held-out pages (seeds 0, 1, ...) as PNG files, with `pages.json` telling what stands on them."""
    folder.mkdir(parents=True, exist_ok=True)
    entries = []
    for seed in range(count):
        made, name = page(seed, "test"), f"page_{seed}.png"
        made.image.save(folder / name, optimize=True)
        marks = [{"row": m.row + 1, "column": m.column + 1, "colour": m.colour, "shape": m.shape} for m in made.marks]
        entries.append({"file": name, "seed": seed, "split": "test", "digits": made.digits.tolist(), "marks": marks})
    lines = ",\n".join("  " + json.dumps(entry) for entry in entries)
    (folder / "pages.json").write_text(f"[\n{lines}\n]\n", encoding="utf-8")


if __name__ == "__main__":
    write_samples(Path(__file__).parent / "pages")
