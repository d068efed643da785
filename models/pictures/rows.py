"""Pictures of any size as rows of patches, which marks may end: Pixtral, Mistral 3, LightOnOCR."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import ceil, sqrt
from typing import Any, ClassVar

import numpy as np

from vkvx.errors import InputError
from vkvx.manifest import TensorSpec
from vkvx.models.pictures.base import Encoded, pattern


@dataclass(frozen=True)
class PatchRows:
    """A picture of patches of ``patch`` pixels, row by row, of which ``merge`` x ``merge`` make a visual token.

    What does not fill a token at the right and at the bottom makes none. ``row_end`` stands after each row of tokens
    but the last, ``end`` after that.
    """

    merge: int
    patch: int
    row_end: str = ""
    end: str = ""
    call_options: ClassVar[Mapping[str, Any]] = {}
    limited: ClassVar[bool] = False
    rows: ClassVar[str] = "M"
    """Of the vision graph's output, which are visual tokens."""

    def __post_init__(self) -> None:
        if min(self.merge, self.patch) < 1:
            raise ValueError("merge and patch must be positive")

    @property
    def pixel_rows(self) -> str:
        """Axis 0 of the vision graph's ``pixel_values``: patches."""
        return "N" if self.merge > 1 else "M"

    def inputs(self) -> tuple[TensorSpec, ...]:
        """Inputs of the vision graph besides pixels; M counts visual tokens, N patches.

        ``position_ids`` are row and column of each patch, ``merge_index`` the patches of each token.
        """
        positions = TensorSpec("position_ids", "int32", (self.pixel_rows, 2))
        merged = TensorSpec("merge_index", "int32", ("M", self.merge**2))
        return (positions,) if self.merge == 1 else (positions, merged)

    def largest(self, tokens: int) -> dict[str, int]:
        """Patches that fill no token stand at two sides: so many for a picture about as high as wide."""
        if self.merge == 1:
            return {"M": tokens}
        sides = 2 * ceil(sqrt(tokens)) * self.merge + self.merge
        return {"M": tokens, "N": self.merge**2 * tokens + (self.merge - 1) * sides}

    def encode(self, features: Mapping[str, Any], image_token: str) -> Encoded:
        """``pixel_values`` [1, channels, height, width], and ``image_sizes`` [1, 2], of which the picture takes."""
        pixels = np.asarray(features["pixel_values"])[0]
        sizes = (int(size) for size in np.asarray(features["image_sizes"])[0])
        high, wide = (size // self.patch for size in sizes)
        rows, columns = high // self.merge, wide // self.merge
        if not rows * columns:
            raise InputError(
                f"the picture makes {high} x {wide} patches, of which {self.merge} x {self.merge} make a token; "
                "give a larger picture"
            )
        cut = pixels[:, : high * self.patch, : wide * self.patch].reshape(-1, high, self.patch, wide, self.patch)
        index = np.arange(high * wide).reshape(high, wide)
        arrays = {"pixel_values": cut.transpose(1, 3, 0, 2, 4).reshape(high * wide, -1, self.patch, self.patch)}
        arrays["position_ids"] = np.stack(np.divmod(index.reshape(-1), wide), 1).astype(np.int32)
        if self.merge > 1:
            whole = index[: rows * self.merge, : columns * self.merge].reshape(rows, self.merge, columns, self.merge)
            arrays["merge_index"] = whole.transpose(0, 2, 1, 3).reshape(rows * columns, -1).astype(np.int32)
        text = self.row_end.join([image_token * columns] * rows) + self.end
        return Encoded(arrays, rows * columns, text)

    def join(self, pictures: Sequence[Encoded]) -> tuple[dict[str, np.ndarray], ...]:
        """A call each: patches of different pictures never meet, and attention takes the square of their number."""
        return tuple(picture.arrays for picture in pictures)

    def tokens(self, height: int, width: int) -> int:
        """Visual tokens of a picture that the image processor made so many pixels."""
        unit = self.patch * self.merge
        return (height // unit) * (width // unit)

    def whole(self, arrays: Mapping[str, np.ndarray]) -> np.ndarray:
        """The pixels [channels, height, width] that these inputs of the vision graph were cut from."""
        high, wide = arrays["position_ids"].max(0) + 1
        patches = arrays["pixel_values"].reshape(high, wide, -1, self.patch, self.patch)
        return patches.transpose(2, 0, 3, 1, 4).reshape(-1, high * self.patch, wide * self.patch)

    def example(self, inputs: Sequence[TensorSpec], tokens: int) -> Encoded:
        """A picture nearly as high as wide."""
        rows, unit = max(1, int(tokens**0.5)), self.patch * self.merge
        size = (rows * unit, max(1, tokens // rows) * unit)
        (pixels,) = (spec for spec in inputs if spec.name == "pixel_values")
        made = pattern((1, int(pixels.shape[1]), *size), pixels.dtype)
        return self.encode({"pixel_values": made, "image_sizes": [size]}, "")
