"""Options of an export."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from vkvx.errors import OptionError
from vkvx.manifest import FLOAT_DTYPES
from vkvx.models.pictures.limits import PixelLimits
from vkvx.options import QuantizationOptions

OPSETS = range(17, 24)


@dataclass(frozen=True, kw_only=True)
class ExportOptions(QuantizationOptions):
    """What ``vkvx export`` can be asked for, beside the options of :class:`vkvx.options.QuantizationOptions`.

    Attributes:
        dtype: of weights, activations and text cache: float16, bfloat16 or float32.
        opset: of the graphs, 17 to 23.
        min_pixels, max_pixels: of a picture once it is resized, where the model's image processor limits them; None
            keeps its own. The bundle's image processor gets them, and ``group_size`` "auto" follows them.
        force: replace an existing bundle.
        cache_dir, revision, trust_remote_code: as in transformers.
    """

    dtype: str = "float16"
    opset: int = 18
    min_pixels: int | None = None
    max_pixels: int | None = None
    force: bool = False
    cache_dir: str | Path | None = None
    revision: str | None = None
    trust_remote_code: bool = False

    def check(self) -> None:
        """Raise OptionError for what no model could be exported with."""
        if self.dtype not in FLOAT_DTYPES:
            raise OptionError(
                f"dtype '{self.dtype}' is not supported; give dtype= (--dtype) {' or '.join(FLOAT_DTYPES)}"
            )
        if self.opset not in OPSETS:
            raise OptionError(
                f"opset {self.opset} is not supported; give opset= (--opset) from {OPSETS[0]} to {OPSETS[-1]}"
            )
        self.limits.check()
        super().check()

    @property
    def limits(self) -> PixelLimits:
        """Of the pixels of pictures."""
        return PixelLimits(self.min_pixels, self.max_pixels)
