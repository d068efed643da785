"""Pictures of any shape as patches, of which squares are averaged: Gemma 4."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from vkvx.manifest import TensorSpec
from vkvx.models.pictures.base import Encoded, pattern, runs


@dataclass(frozen=True)
class PooledPatches:
    """A picture of patches row by row, of which ``pool`` x ``pool`` make a visual token, between two marks."""

    pool: int
    before: str
    after: str
    call_options: ClassVar[Mapping[str, Any]] = {}
    limited: ClassVar[bool] = False
    rows: ClassVar[str] = "M"
    """Of the vision graph's output, which are visual tokens."""

    def __post_init__(self) -> None:
        if self.pool < 1:
            raise ValueError("pool must be positive")

    @property
    def pixel_rows(self) -> str:
        """Axis 0 of the vision graph's ``pixel_values``: patches."""
        return f"{self.pool**2}*M"

    def inputs(self) -> tuple[TensorSpec, ...]:
        """Inputs of the vision graph besides pixels; M counts visual tokens."""
        return (
            TensorSpec("image_position_ids", "int32", (self.pixel_rows, 2)),
            TensorSpec("pool_index", "int32", ("M", self.pool**2)),
        )

    def encode(self, features: Mapping[str, Any], image_token: str) -> Encoded:
        """``pixel_values`` [1, N, ...] and ``image_position_ids`` [1, N, 2], column and row, or -1 for no patch.

        The vision graph gets the N patches that there are, and ``pool_index`` INT32 [M, pool²], those of each token.
        """
        positions = np.asarray(features["image_position_ids"])[0]
        valid = positions[:, 0] >= 0
        positions = positions[valid].astype(np.int32)
        column, row = positions.T // self.pool
        width = int(column.max()) + 1
        order = np.argsort(row * width + column, kind="stable").reshape(-1, self.pool**2).astype(np.int32)
        arrays = {
            "pixel_values": np.asarray(features["pixel_values"])[0][valid],
            "image_position_ids": positions,
            "pool_index": order,
        }
        return Encoded(arrays, len(order), f"{self.before}{image_token * len(order)}{self.after}")

    def join(self, pictures: Sequence[Encoded]) -> tuple[dict[str, np.ndarray], ...]:
        """A call each: patches of different pictures never meet, and attention takes the square of their number."""
        return tuple(picture.arrays for picture in pictures)

    def largest(self, tokens: int) -> dict[str, int]:
        """Every token has as many patches."""
        return {"M": tokens}

    def split(self, token_ids: np.ndarray, visual: np.ndarray) -> tuple[int, ...]:
        """Each run of visual tokens is a picture."""
        return tuple(end - start for start, end in runs(visual))

    def example(self, inputs: Sequence[TensorSpec], tokens: int) -> Encoded:
        """A picture nearly as high as wide."""
        rows = max(1, int(tokens**0.5))
        height, width = rows * self.pool, max(1, tokens // rows) * self.pool
        (pixels,) = (spec for spec in inputs if spec.name == "pixel_values")
        shape = (1, height * width, *(int(size) for size in pixels.shape[1:]))
        row, column = np.divmod(np.arange(height * width), width)
        features = {
            "pixel_values": pattern(shape, pixels.dtype),
            "image_position_ids": np.stack([column, row], 1)[None],
        }
        return self.encode(features, "")
