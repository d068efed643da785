"""Pictures cut into tiles of one size: LLaVA-1.5 (one tile each), InternVL, Idefics3, SmolVLM."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from vkvx.manifest import TensorSpec
from vkvx.models.pictures.base import Encoded, check_whole, pattern, runs


@dataclass(frozen=True)
class Tiles:
    """Pictures cut into any number of tiles of one size, of ``tile_tokens`` visual tokens each, between two marks.

    Without marks every picture is one tile (LLaVA-1.5); with marks tiles follow each other, the thumbnail last
    (InternVL).
    """

    tile_tokens: int
    before: str = ""
    after: str = ""

    def __post_init__(self) -> None:
        _check_tiles(self.tile_tokens)

    call_options: ClassVar[Mapping[str, Any]] = {}
    limited: ClassVar[bool] = False
    pixel_rows: ClassVar[str] = "P"
    """Axis 0 of the vision graph's ``pixel_values``: tiles."""

    def inputs(self) -> tuple[TensorSpec, ...]:
        """Of the vision graph besides pixels: none."""
        return ()

    @property
    def rows(self) -> str:
        """Rows of the vision graph's output for P tiles."""
        return f"{self.tile_tokens}*P"

    def largest(self, tokens: int) -> dict[str, int]:
        """Whole tiles."""
        return {"P": max(1, tokens // self.tile_tokens)}

    def encode(self, features: Mapping[str, Any], image_token: str) -> Encoded:
        """``pixel_values`` [tiles, channels, height, width]."""
        pixels = np.asarray(features["pixel_values"])
        tokens = len(pixels) * self.tile_tokens
        return Encoded({"pixel_values": pixels}, tokens, f"{self.before}{image_token * tokens}{self.after}")

    def join(self, pictures: Sequence[Encoded]) -> tuple[dict[str, np.ndarray], ...]:
        """All tiles in one call."""
        return _joined(pictures)

    def split(self, token_ids: np.ndarray, visual: np.ndarray) -> tuple[int, ...]:
        """With marks each run of visual tokens is a picture, without them each ``tile_tokens``."""
        if not self.before:
            lengths = (self.tile_tokens,) * (int(visual.sum()) // self.tile_tokens)
        else:
            lengths = tuple(end - start for start, end in runs(visual))
        check_whole(lengths, int(visual.sum()), self.tile_tokens)
        return lengths

    def example(self, inputs: Sequence[TensorSpec], tokens: int) -> Encoded:
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

    def __post_init__(self) -> None:
        _check_tiles(self.tile_tokens)

    call_options: ClassVar[Mapping[str, Any]] = {"return_row_col_info": True}
    limited: ClassVar[bool] = False
    pixel_rows: ClassVar[str] = "P"
    """Axis 0 of the vision graph's ``pixel_values``: tiles."""

    def inputs(self) -> tuple[TensorSpec, ...]:
        """Of the vision graph besides pixels: none."""
        return ()

    @property
    def rows(self) -> str:
        """Rows of the vision graph's output for P tiles."""
        return f"{self.tile_tokens}*P"

    def largest(self, tokens: int) -> dict[str, int]:
        """Whole tiles."""
        return {"P": max(1, tokens // self.tile_tokens)}

    def encode(self, features: Mapping[str, Any], image_token: str) -> Encoded:
        """``pixel_values`` [1, tiles, channels, height, width], and ``rows``, ``cols`` [1][1]: 0 if nothing is cut."""
        pixels = np.asarray(features["pixel_values"])[0]
        rows, columns = int(features["rows"][0][0]), int(features["cols"][0][0])
        visual = image_token * self.tile_tokens
        text = ""
        for row in range(rows):
            for column in range(columns):
                mark = self.tile.replace("{row}", str(row + 1)).replace("{column}", str(column + 1))
                text += f"{self.around}{mark}{visual}"
            text += "\n"
        if text:
            text += "\n"
        text += f"{self.around}{self.whole}{visual}{self.around}"
        return Encoded({"pixel_values": pixels}, len(pixels) * self.tile_tokens, text)

    def join(self, pictures: Sequence[Encoded]) -> tuple[dict[str, np.ndarray], ...]:
        """All tiles in one call."""
        return _joined(pictures)

    def split(self, token_ids: np.ndarray, visual: np.ndarray) -> tuple[int, ...]:
        """A picture ends where ``around`` follows a tile and other text or the next picture follows that."""
        lengths: list[int] = []
        found = runs(visual)
        for i, (start, end) in enumerate(found):
            between = token_ids[found[i - 1][1] : start] if i else token_ids[:0]
            # Before a tile of the same picture: the mark alone, or line breaks and the mark.
            if i > 0 and (len(between) == 2 or between[0] != token_ids[start - 2]):
                lengths[-1] += end - start
            else:
                lengths.append(end - start)
        check_whole(lengths, int(visual.sum()), self.tile_tokens)
        return tuple(lengths)

    def example(self, inputs: Sequence[TensorSpec], tokens: int) -> Encoded:
        """As many tiles as hold so many tokens."""
        return _tiles(inputs, tokens, self.tile_tokens)


def _check_tiles(tile_tokens: int) -> None:
    if tile_tokens < 1:
        raise ValueError("tile_tokens must be positive")


def _joined(pictures: Sequence[Encoded]) -> tuple[dict[str, np.ndarray], ...]:
    names = pictures[0].arrays
    return ({name: np.concatenate([picture.arrays[name] for picture in pictures]) for name in names},)


def _tiles(inputs: Sequence[TensorSpec], tokens: int, tile_tokens: int) -> Encoded:
    count = max(1, tokens // tile_tokens)
    shapes = {spec.name: (count, *(int(size) for size in spec.shape[1:])) for spec in inputs}
    arrays = {spec.name: pattern(shapes[spec.name], spec.dtype) for spec in inputs}
    return Encoded(arrays, count * tile_tokens, "")
