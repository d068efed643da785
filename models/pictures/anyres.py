"""Pictures of any resolution as a small whole and a grid of tiles: LLaVA-NeXT, LLaVA-OneVision.

The arithmetic is that of ``select_best_resolution`` and ``pack_image_features`` in transformers.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from math import ceil, sqrt
from typing import Any, ClassVar

import numpy as np

from vkvx.errors import InputError
from vkvx.manifest import TensorSpec
from vkvx.models.pictures.base import Encoded, Taken, pattern, taps

MOST_TOKENS = 1 << 22
"""Of the tiles of one picture."""
SLACK = 1.1
"""Features are scaled down where their side is more than this times that of the most tiles."""


@dataclass(frozen=True)
class AnyRes:
    """A picture in one tile, then the same in the grid of tiles that suits it best, a mark behind each row of tokens.

    A tile of ``tile_pixels`` squared has ``side`` squared tokens. ``grids`` are the grids to choose from, rows and
    columns, such as ``"1x2 2x1"``. Tokens of the tiles that show padding alone are dropped. What is more than
    ``most_tiles`` is scaled down to them (0: nothing is).

    ``video_mark`` is the token for a video ("": there are none). A frame of it is one tile, whose features are scaled
    down to half on each side; the mark of a row stands behind the last one alone.
    """

    side: int
    tile_pixels: int
    grids: str
    most_tiles: int = 0
    video_mark: str = ""
    frame_start: ClassVar[str] = ""
    frame_options: ClassVar[Mapping[str, Any]] = {}
    call_options: ClassVar[Mapping[str, Any]] = {}
    limited: ClassVar[bool] = False
    pixel_rows: ClassVar[str] = "P"
    """Axis 0 of the vision graph's ``pixel_values``: tiles."""
    rows: ClassVar[str] = "M"
    """Of the vision graph's output, which are visual tokens."""

    def __post_init__(self) -> None:
        if min(self.side, self.tile_pixels, *(min(grid) for grid in self._grids or [(0, 0)])) < 1:
            raise ValueError("side, tile_pixels and grids must be positive")
        if max(rows * columns for rows, columns in self._grids) * self.side**2 > MOST_TOKENS:
            raise ValueError(f"the tiles of a grid must have at most {MOST_TOKENS} tokens")

    def inputs(self) -> tuple[TensorSpec, ...]:
        """Inputs of the vision graph besides pixels, in the order of :meth:`packing`; M counts visual tokens."""
        if not self.most_tiles:
            return (TensorSpec("pack_index", "int32", ("M", 1)),)
        return TensorSpec("pack_index", "int32", ("M", 4)), TensorSpec("pack_weight", "float32", ("M", 4))

    def encode(self, features: Mapping[str, Any], image_token: str) -> Encoded:
        """``pixel_values`` [1, tiles, channels, height, width] and ``image_sizes`` [1, 2], the picture's own."""
        pixels = np.asarray(features["pixel_values"])[0]
        height, width = (int(size) for size in np.asarray(features["image_sizes"])[0])
        tiles = 1 + int(np.prod(self.grid(height, width)))
        if len(pixels) != tiles:
            raise InputError(
                f"the image processor cuts the picture into {len(pixels)} tiles, the model wants {tiles}; "
                "fix image_grid_pinpoints of the image processor and export the model again"
            )
        arrays = {"pixel_values": pixels, **self.packing(height, width)}
        tokens = len(arrays["pack_index"])
        return Encoded(arrays, tokens, image_token * tokens)

    def frame_tokens(self, height: int, width: int, patch_size: int) -> int:
        """A frame has one tile, whatever its size was."""
        return ceil(self.side / 2) ** 2

    def encode_video(
        self, frames: Iterable[Mapping[str, Any]], taken: Taken, image_token: str, temporal: int, patch_size: int
    ) -> Iterator[Encoded]:
        """A picture a frame, from ``pixel_values`` [1, tiles, channels, height, width]: the first tile is the whole."""
        half, area = ceil(self.side / 2), self.side**2
        index, weight = _resampled(np.arange(area).reshape(self.side, self.side), half, half)
        mark, one = np.full((1, 4), area), np.array([[1, 0, 0, 0]], np.float32)
        for number, features in enumerate(frames, 1):
            last = int(number == len(taken.indices))
            arrays = {
                "pixel_values": np.asarray(features["pixel_values"])[0][:1],
                "pack_index": np.concatenate([index.reshape(-1, 4), *[mark] * last]).astype(np.int32),
                "pack_weight": np.concatenate([weight.reshape(-1, 4), *[one] * last]),
            }
            tokens = half**2 + last
            yield Encoded(arrays, tokens, image_token * tokens)

    def join(self, pictures: Sequence[Encoded]) -> tuple[dict[str, np.ndarray], ...]:
        """A call each: an index counts from the first tile of its call."""
        return tuple(picture.arrays for picture in pictures)

    def largest(self, tokens: int) -> dict[str, int]:
        """As many tiles as the largest grid has, and the whole."""
        return {"M": tokens, "P": 1 + max(rows * columns for rows, columns in self._grids)}

    def tokens(self, height: int, width: int) -> int:
        """Visual tokens of a picture of so many pixels."""
        return len(self.packing(height, width)["pack_index"])

    def grid(self, height: int, width: int) -> tuple[int, int]:
        """Rows and columns of tiles: as much of the picture's own resolution, then as little padding as there is."""

        def merit(grid: tuple[int, int]) -> tuple[int, int]:
            high, wide = grid[0] * self.tile_pixels, grid[1] * self.tile_pixels
            scale = min(wide / width, high / height)
            useful = min(int(width * scale) * int(height * scale), width * height)
            return useful, useful - high * wide

        return max(self._grids, key=merit)

    def packing(self, height: int, width: int) -> dict[str, np.ndarray]:
        """``pack_index`` INT32 [M, taps]: rows of all tiles' tokens that make each visual token, in a picture of so
        many pixels; one more row, the last, is the mark behind a row. ``pack_weight`` FP32 [M, taps] are their shares.
        """
        rows, columns = self.grid(height, width)
        area = self.side**2
        row, column = np.indices((rows * self.side, columns * self.side))
        tile = 1 + row // self.side * columns + column // self.side
        cells = self._unpadded(tile * area + row % self.side * self.side + column % self.side, height, width)
        high, wide = self._scaled(*cells.shape)
        index, weight = _resampled(cells, high, wide)
        mark = np.full((high, 1, 4), (1 + rows * columns) * area)
        one = np.array([1, 0, 0, 0], np.float32)
        index = np.concatenate([index, mark], 1).reshape(-1, 4)
        index = np.concatenate([np.arange(area).repeat(4).reshape(-1, 4), index]).astype(np.int32)
        weight = np.concatenate([weight, np.tile(one, (high, 1, 1))], 1).reshape(-1, 4)
        weight = np.concatenate([np.tile(one, (area, 1)), weight]).astype(np.float32)
        # Where nothing is scaled the first tap has the whole weight.
        return {"pack_index": index, "pack_weight": weight} if self.most_tiles else {"pack_index": index[:, :1]}

    def example(self, inputs: Sequence[TensorSpec], tokens: int) -> Encoded:
        """A picture that fills the grid with the number of tokens next to this."""
        rows, columns = min(self._grids, key=lambda grid: abs((1 + grid[0] * grid[1]) * self.side**2 - tokens))
        (pixels,) = (spec for spec in inputs if spec.name == "pixel_values")
        height, width = rows * self.tile_pixels, columns * self.tile_pixels
        shape = (1, 1 + rows * columns, *(int(size) for size in pixels.shape[1:]))
        return self.encode({"pixel_values": pattern(shape, pixels.dtype), "image_sizes": [[height, width]]}, "")

    @cached_property
    def _grids(self) -> list[tuple[int, int]]:
        pairs = (grid.split("x") for grid in self.grids.split())
        return [(int(rows), int(columns)) for rows, columns in pairs]

    def _unpadded(self, cells: np.ndarray, height: int, width: int) -> np.ndarray:
        """What of cells [rows, columns] shows a picture of so many pixels, which lies in their middle."""
        high, wide = cells.shape
        if width / height > wide / high:
            margin = (high - int(round(height * (wide / width), 7))) // 2
            return cells[margin : high - margin]
        margin = (wide - int(round(width * (high / height), 7))) // 2
        return cells[:, margin : wide - margin]

    def _scaled(self, high: int, wide: int) -> tuple[int, int]:
        """Rows and columns of tokens that are left of so many."""
        ratio = sqrt(high * wide / (self.most_tiles * self.side**2)) if self.most_tiles else 0.0
        return (int(high // ratio), int(wide // ratio)) if ratio > SLACK else (high, wide)


def _resampled(cells: np.ndarray, high: int, wide: int) -> tuple[np.ndarray, np.ndarray]:
    """Which of INT cells [rows, columns] make each of high x wide cells: INT and FP32 [high, wide, taps]."""
    sizes = zip((high, wide), cells.shape, strict=True)
    pairs = [taps(np.arange(size), size, entries, "bilinear") for size, entries in sizes]
    (row_taps, row_weight), (column_taps, column_weight) = pairs
    index = cells[row_taps[:, None, :, None], column_taps[None, :, None, :]].reshape(high, wide, 4)
    weight = (row_weight[:, None, :, None] * column_weight[None, :, None, :]).reshape(high, wide, 4)
    return index, weight
