"""The ways in which families turn a picture into tokens. A family chooses one, its numbers are in the manifest.

A picture stands in a prompt as one placeholder. What takes its place is text: the model's image token once for each
visual token, and whatever marks the family puts around and between them. The whole prompt is tokenised afterwards, as
transformers' processors do it, so that the tokens are theirs.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

import numpy as np

from vkvx.errors import BundleError, InputError
from vkvx.manifest import PictureInfo, TensorSpec


@dataclass(frozen=True)
class Encoded:
    """A picture, ready: its part of each input of the vision graph, its visual tokens, and its ``text`` in a prompt.

    The arrays of several pictures are joined along axis 0.
    """

    arrays: dict[str, np.ndarray]
    tokens: int
    text: str


class Pictures(Protocol):
    """One way to turn pictures into tokens; made by :func:`open_pictures`."""

    @property
    def call_options(self) -> Mapping[str, Any]:
        """What the image processor is to be called with, besides the picture."""

    def encode(self, features: Mapping[str, Any], image_token: str) -> Encoded:
        """One picture, from what the image processor gives for it alone (NumPy arrays and lists).

        Raises InputError for features that the model's vision graph cannot take.
        """

    def split(self, token_ids: np.ndarray, visual: np.ndarray) -> tuple[int, ...]:
        """Visual tokens of each picture in a row of INT tokens [n], of which BOOL ``visual`` [n] are visual.

        Raises InputError if they are not made of whole pictures.
        """

    def example(self, inputs: Sequence[TensorSpec], tokens: int) -> tuple[dict[str, np.ndarray], int]:
        """Inputs of the vision graph for a made-up picture of about so many tokens, and how many they are.

        Pixels are a fixed pattern from -1 to 1.
        """


@dataclass(frozen=True)
class Tiles:
    """Pictures cut into any number of tiles of one size, of ``tile_tokens`` visual tokens each, between two marks.

    Without marks every picture is one tile (LLaVA-1.5); with marks tiles follow each other, the thumbnail last
    (InternVL).
    """

    tile_tokens: int
    before: str = ""
    after: str = ""

    call_options: ClassVar[Mapping[str, Any]] = {}

    def encode(self, features: Mapping[str, Any], image_token: str) -> Encoded:
        """``pixel_values`` [tiles, channels, height, width]."""
        pixels = np.asarray(features["pixel_values"])
        tokens = len(pixels) * self.tile_tokens
        return Encoded({"pixel_values": pixels}, tokens, f"{self.before}{image_token * tokens}{self.after}")

    def split(self, token_ids: np.ndarray, visual: np.ndarray) -> tuple[int, ...]:
        """With marks each run of visual tokens is a picture, without them each ``tile_tokens``."""
        if not self.before:
            lengths = (self.tile_tokens,) * (int(visual.sum()) // self.tile_tokens)
        else:
            lengths = tuple(end - start for start, end in _runs(visual))
        _check_whole(lengths, int(visual.sum()), self.tile_tokens)
        return lengths

    def example(self, inputs: Sequence[TensorSpec], tokens: int) -> tuple[dict[str, np.ndarray], int]:
        """As many tiles as hold so many tokens."""
        return _tiles(inputs, tokens, self.tile_tokens)


@dataclass(frozen=True)
class TileGrid:
    """Pictures cut into rows and columns of tiles, each behind a mark that says which; last the whole (Idefics3).

    Every tile has ``tile_tokens`` visual tokens. ``around`` stands before each mark and after the picture, ``tile`` is
    the mark of a tile with its row and column to be filled in, ``whole`` the mark of the whole picture.
    """

    tile_tokens: int
    around: str
    tile: str
    whole: str

    call_options: ClassVar[Mapping[str, Any]] = {"return_row_col_info": True}

    def encode(self, features: Mapping[str, Any], image_token: str) -> Encoded:
        """``pixel_values`` [1, tiles, channels, height, width], and ``rows``, ``cols`` [1][1]: 0 if nothing is cut."""
        pixels = np.asarray(features["pixel_values"])[0]
        rows, columns = int(features["rows"][0][0]), int(features["cols"][0][0])
        visual = image_token * self.tile_tokens
        text = ""
        for row in range(rows):
            for column in range(columns):
                text += f"{self.around}{self.tile.format(row=row + 1, column=column + 1)}{visual}"
            text += "\n"
        if text:
            text += "\n"
        text += f"{self.around}{self.whole}{visual}{self.around}"
        return Encoded({"pixel_values": pixels}, len(pixels) * self.tile_tokens, text)

    def split(self, token_ids: np.ndarray, visual: np.ndarray) -> tuple[int, ...]:
        """A picture ends where ``around`` follows a tile and other text or the next picture follows that."""
        lengths: list[int] = []
        runs = _runs(visual)
        for i, (start, end) in enumerate(runs):
            between = token_ids[runs[i - 1][1] : start] if i else token_ids[:0]
            # Before a tile of the same picture: the mark alone, or line breaks and the mark.
            continues = i > 0 and (len(between) == 2 or between[0] != token_ids[start - 2])
            if continues:
                lengths[-1] += end - start
            else:
                lengths.append(end - start)
        _check_whole(lengths, int(visual.sum()), self.tile_tokens)
        return tuple(lengths)

    def example(self, inputs: Sequence[TensorSpec], tokens: int) -> tuple[dict[str, np.ndarray], int]:
        """As many tiles as hold so many tokens."""
        return _tiles(inputs, tokens, self.tile_tokens)


KINDS: dict[str, type[Tiles] | type[TileGrid]] = {"tiles": Tiles, "tile grid": TileGrid}


def describe(pictures: Tiles | TileGrid) -> PictureInfo:
    """What a manifest holds of it."""
    kind = next(name for name, known in KINDS.items() if type(pictures) is known)
    fields = vars(pictures)
    numbers = {name: value for name, value in fields.items() if isinstance(value, int)}
    return PictureInfo(kind, numbers, {name: value for name, value in fields.items() if isinstance(value, str)})


def open_pictures(info: PictureInfo) -> Pictures:
    """What a manifest describes. Raises BundleError for a kind or numbers that are not known."""
    if info.kind not in KINDS:
        raise BundleError(
            f"pictures of kind '{info.kind}' are not known to this vkvx; upgrade it with `pip install --upgrade vkvx`"
        )
    try:
        pictures = KINDS[info.kind](**info.numbers, **info.marks)  # type: ignore[arg-type]
    except TypeError as error:
        raise BundleError(f"the manifest's model.pictures do not suit ({error}); export the model again") from error
    if pictures.tile_tokens < 1:
        raise BundleError("model.pictures.numbers must be positive; export the model again")
    return pictures


def pattern(shape: Sequence[int], dtype: str) -> np.ndarray:
    """A fixed wave from -1 to 1, FP32 where ``dtype`` is bfloat16."""
    count = int(np.prod(shape))
    wave = np.arange(count, dtype=np.int64) * 7919 % 509 / 254.0 - 1
    return wave.astype(np.float32 if dtype == "bfloat16" else dtype).reshape(shape)


def _tiles(inputs: Sequence[TensorSpec], tokens: int, tile_tokens: int) -> tuple[dict[str, np.ndarray], int]:
    count = max(1, tokens // tile_tokens)
    shapes = {spec.name: (count, *(int(size) for size in spec.shape[1:])) for spec in inputs}
    return {spec.name: pattern(shapes[spec.name], spec.dtype) for spec in inputs}, count * tile_tokens


def _runs(visual: np.ndarray) -> list[tuple[int, int]]:
    """First and past-the-last index of each run of True."""
    edges = np.flatnonzero(np.diff(np.concatenate([[False], visual, [False]]).astype(np.int8)))
    return [(int(start), int(end)) for start, end in edges.reshape(-1, 2)]


def _check_whole(lengths: Sequence[int], tokens: int, tile_tokens: int) -> None:
    if sum(lengths) != tokens or any(length % tile_tokens for length in lengths):
        raise InputError(
            f"{tokens} visual tokens in a row are not made of whole pictures of {tile_tokens} tokens a tile; "
            "give each picture in one call"
        )
