"""Limits of the pixels of a picture, for image processors that take pictures of any size. No torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from vkvx.errors import OptionError
from vkvx.options import keyword

_LEAST, _MOST = keyword("min_pixels"), keyword("max_pixels")


@dataclass(frozen=True)
class PixelLimits:
    """Least and most pixels of a picture once it is resized, as the image processor counts them; None: its own."""

    min_pixels: int | None = None
    max_pixels: int | None = None

    def __bool__(self) -> bool:
        return self.min_pixels is not None or self.max_pixels is not None

    def check(self) -> None:
        """Raise OptionError for limits that no image processor could have."""
        for name, value in ((_LEAST, self.min_pixels), (_MOST, self.max_pixels)):
            if value is not None and value < 1:
                raise OptionError(f"{name} must be at least 1, got {value}")
        if self.min_pixels is not None and self.max_pixels is not None and self.min_pixels > self.max_pixels:
            raise OptionError(
                f"{_LEAST} {self.min_pixels} is more than {_MOST} {self.max_pixels}; give limits in this order"
            )

    def size(self, images: Any, limited: bool, positions: int) -> Mapping[str, int]:
        """``size`` of an image processor of transformers with these limits in place of its own.

        Raises OptionError unless its pictures are ``limited`` by their pixels, for less than one visual token, for more
        in each picture than the model has ``positions``, and for a limit that contradicts one that stays.
        """
        self.check()
        if not limited:
            raise OptionError(
                f"{_LEAST} and {_MOST} suit models alone whose pictures keep their proportions within limits of pixels "
                "(see docs/models.md), this one is none; leave them out"
            )
        unit = (images.patch_size * images.merge_size) ** 2
        for name, value in ((_LEAST, self.min_pixels), (_MOST, self.max_pixels)):
            if value is not None and value < unit:
                raise OptionError(
                    f"{name} {value} is less than the {unit} pixels of a visual token; give {unit} or more"
                )
        size: dict[str, int] = dict(images.size)
        least = size["shortest_edge"] if self.min_pixels is None else self.min_pixels
        most = size["longest_edge"] if self.max_pixels is None else self.max_pixels
        if least > most:
            other = _LEAST if self.min_pixels is None else _MOST
            raise OptionError(
                f"the image processor would make at least {least} and at most {most} pixels of a picture; "
                f"give {other} as well"
            )
        if least // unit > positions:  # before memory is taken for them
            raise OptionError(
                f"{_LEAST} {least} makes at least {least // unit} visual tokens of a picture, the model knows "
                f"{positions} positions; give less"
            )
        return {"shortest_edge": least, "longest_edge": most}


NO_LIMITS = PixelLimits()
"""Leaves those of the image processor."""
