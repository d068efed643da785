"""Pictures of any size as a grid of patches: Qwen-VL, GLM-V, PaddleOCR-VL.

The arithmetic is that of ``vision_utils`` in transformers, for one picture at a time.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import numpy as np

from vkvx.errors import InputError
from vkvx.manifest import TensorSpec
from vkvx.models.pictures.base import KERNELS, Encoded, Taken, pattern, runs, taps


@dataclass(frozen=True)
class Grid:
    """A picture of h x w patches, of which ``merge`` x ``merge`` make a visual token; patches come block by block.

    ``window`` is the side in tokens of the windows that some layers of the tower attend within (0: there are none).
    ``table`` is the side of a learnt table of positions that is resampled by ``kernel`` (0: there is none); with
    ``corners`` its corner entries are those of the corner patches. With ``raster`` patches come row by row.

    ``video_mark`` is the token for a video ("": there are none), whose frames, some to a patch, follow each other by
    ``pace`` positions a second (0: by one), or each behind its time, between ``frame_start`` and ``frame_end``.
    """

    merge: int
    window: int = 0
    table: int = 0
    raster: int = 0
    kernel: str = ""
    corners: int = 0
    pace: int = 0
    video_mark: str = ""
    frame_start: str = ""
    frame_end: str = ""
    call_options: ClassVar[Mapping[str, Any]] = {}
    frame_options: ClassVar[Mapping[str, Any]] = {"do_resize": False}
    limited: ClassVar[bool] = True
    rows: ClassVar[str] = "M"
    """Of the vision graph's output, which are visual tokens."""

    def __post_init__(self) -> None:
        if self.merge < 1 or (self.table and self.kernel not in KERNELS):
            raise ValueError(f"merge must be positive, kernel one of {', '.join(KERNELS)}")

    @property
    def pixel_rows(self) -> str:
        """Axis 0 of the vision graph's ``pixel_values``: patches."""
        return f"{self.merge**2}*M"

    def inputs(self) -> tuple[TensorSpec, ...]:
        """Inputs of the vision graph besides pixels, in the order of :meth:`geometry`; M counts visual tokens."""
        unit, specs = self.merge**2, []
        specs.append(TensorSpec("position_ids", "int32", (self.pixel_rows, 2)))
        if self.window:
            specs.append(TensorSpec("window_index", "int32", ("M",)))
            specs.append(TensorSpec("window_patches", "int32", ("W", self.window**2 * unit)))
            specs.append(TensorSpec("window_place", "int32", (self.pixel_rows,)))
        if self.table:
            count = KERNELS[self.kernel] ** 2
            specs.append(TensorSpec("table_index", "int32", (self.pixel_rows, count)))
            specs.append(TensorSpec("table_weight", "float32", (self.pixel_rows, count)))
        if self.raster:
            specs.append(TensorSpec("merge_index", "int32", ("M", unit)))
        return tuple(specs)

    def positions(self, height: int, width: int) -> np.ndarray:
        """Time, row and column of each visual token, INT32 [3, M], of a picture of so many patches."""
        row, column = np.divmod(np.arange(height * width // self.merge**2), width // self.merge)
        return np.stack([np.zeros_like(row), row, column]).astype(np.int32)

    def encode(self, features: Mapping[str, Any], image_token: str) -> Encoded:
        """``pixel_values`` [N, ...] and ``image_grid_thw`` [1, 3]: one frame of h x w patches."""
        _, height, width = (int(size) for size in np.asarray(features["image_grid_thw"])[0])
        arrays = {"pixel_values": np.asarray(features["pixel_values"]), **self.geometry(height, width)}
        tokens = height * width // self.merge**2
        return Encoded(arrays, tokens, image_token * tokens, self.positions(height, width))

    def frame_tokens(self, height: int, width: int, patch_size: int) -> int:
        """As those of a picture."""
        return height * width // (patch_size * self.merge) ** 2

    def encode_video(
        self, frames: Iterable[Mapping[str, Any]], taken: Taken, image_token: str, temporal: int, patch_size: int
    ) -> Iterator[Encoded]:
        """A picture for every ``temporal`` frames, which are given as pictures; the last one fills up.

        Time counts from the first frame of the video, row and column as in a picture.
        """
        if taken.rate is None and (self.pace or self.frame_start):
            raise InputError("this model is told when frames were; give fps= (--fps), how many a second there are")
        seconds = taken.seconds(temporal)
        interval = np.float32(self.pace) * np.float32(taken.interval(temporal)) if self.pace else np.float32(1)
        for number, features in enumerate(_batched(frames, temporal)):
            one = self.encode(features[0], image_token)
            assert one.positions is not None
            # A picture repeats itself in each of its patches: [N, channels, temporal, pixels].
            shape = (one.arrays["pixel_values"].shape[0], -1, temporal, patch_size**2)
            parts = [np.asarray(frame["pixel_values"]).reshape(shape)[:, :, 0] for frame in features]
            pixels = np.stack(parts, 2).reshape(shape[0], -1)
            text, positions, advance = one.text, one.positions, int(one.positions.max()) + 1
            if self.frame_start:
                text = f"<{seconds[number]:.1f} seconds>{self.frame_start}{text}{self.frame_end}"
            else:
                start = int(np.float32(number) * interval)
                positions = positions + np.array([[start], [0], [0]], np.int32)
                advance = 0 if (number + 1) * temporal < len(taken.indices) else advance
            arrays = {**one.arrays, "pixel_values": pixels}
            yield replace(one, arrays=arrays, text=text, positions=positions, advance=advance)

    def geometry(self, height: int, width: int) -> dict[str, np.ndarray]:
        """What the vision graph takes besides pixels: ``position_ids`` INT32 [N, 2], and what the options ask for.

        ``window_index`` INT32 [M] orders tokens by windows, ``window_patches`` INT32 [W, window² merge²] holds the
        patches of each window in that order (-1 fills up), ``window_place`` INT32 [N] where each of them stands there.
        ``table_index`` INT32 and ``table_weight`` FP32 [N, taps²] resample the table. ``merge_index`` INT32
        [M, merge²] are the patches of each token.
        """
        order = self._order(height, width)
        row, column = np.divmod(order, width)
        arrays = {"position_ids": np.stack([row, column], 1).astype(np.int32)}
        if self.window:
            arrays |= self._windows(height // self.merge, width // self.merge)
        if self.table:
            corners = bool(self.corners)
            pairs = (
                taps(row, height, self.table, self.kernel, corners=corners),
                taps(column, width, self.table, self.kernel, corners=corners),
            )
            (row_taps, row_weight), (column_taps, column_weight) = pairs
            index = row_taps[:, :, None] * self.table + column_taps[:, None, :]
            weight = row_weight[:, :, None] * column_weight[:, None, :]
            arrays["table_index"] = index.reshape(len(order), -1).astype(np.int32)
            arrays["table_weight"] = weight.reshape(len(order), -1).astype(np.float32)
        if self.raster:
            blocks = _blocks(height, width, self.merge).reshape(-1, self.merge**2)
            arrays["merge_index"] = blocks.astype(np.int32)
        return arrays

    def join(self, pictures: Sequence[Encoded]) -> tuple[dict[str, np.ndarray], ...]:
        """A call each: patches of different pictures never meet, and attention takes the square of their number."""
        return tuple(picture.arrays for picture in pictures)

    def largest(self, tokens: int) -> dict[str, int]:
        """A window holds at least one token."""
        return {"M": tokens, "W": tokens} if self.window else {"M": tokens}

    def split(self, token_ids: np.ndarray, visual: np.ndarray) -> tuple[int, ...]:
        """Each run of visual tokens is a picture: these models put a mark before and after each."""
        return tuple(end - start for start, end in runs(visual))

    def example(self, inputs: Sequence[TensorSpec], tokens: int) -> Encoded:
        """A picture nearly as high as wide."""
        rows = max(1, int(tokens**0.5))
        height, width = rows * self.merge, max(1, tokens // rows) * self.merge
        (pixels,) = (spec for spec in inputs if spec.name == "pixel_values")
        shape = (height * width, *(int(size) for size in pixels.shape[1:]))
        features = {"pixel_values": pattern(shape, pixels.dtype), "image_grid_thw": [[1, height, width]]}
        return self.encode(features, "")

    def _order(self, height: int, width: int) -> np.ndarray:
        """Which patch, counted row by row, comes when."""
        return np.arange(height * width) if self.raster else _blocks(height, width, self.merge)

    def _windows(self, rows: int, columns: int) -> dict[str, np.ndarray]:
        side, unit = self.window, self.merge**2
        # Where a side is a multiple of the window, vision_utils adds a row of empty windows, which it then drops.
        high, wide = -(-rows // side), -(-columns // side)
        padded = np.full((high * side, wide * side), -1)
        padded[:rows, :columns] = np.arange(rows * columns).reshape(rows, columns)
        cells = padded.reshape(high, side, wide, side).transpose(0, 2, 1, 3).reshape(high * wide, side * side)
        # Within a window its tokens come first, as they follow each other once they are ordered by windows.
        counts = (cells >= 0).sum(1) * unit
        starts = np.cumsum(counts) - counts
        place = np.arange(side * side * unit)
        patches = np.where(place < counts[:, None], starts[:, None] + place, -1)
        return {
            "window_index": cells[cells >= 0].astype(np.int32),
            "window_patches": patches.astype(np.int32),
            "window_place": np.flatnonzero(patches >= 0).astype(np.int32),
        }


def _blocks(height: int, width: int, merge: int) -> np.ndarray:
    """Patches, counted row by row, in blocks of merge x merge."""
    grid = np.arange(height * width).reshape(height // merge, merge, width // merge, merge)
    return grid.transpose(0, 2, 1, 3).reshape(-1)


def _batched(frames: Iterable[Mapping[str, Any]], count: int) -> Iterator[list[Mapping[str, Any]]]:
    """So many frames at a time; the last one stands for those that are missing."""
    batch: list[Mapping[str, Any]] = []
    for frame in frames:
        batch.append(frame)
        if len(batch) == count:
            yield batch
            batch = []
    if batch:
        yield batch + [batch[-1]] * (count - len(batch))
