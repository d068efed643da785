"""Whether a model can be exported, and what its pictures take in the cache, from its config and processor files."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from vkvx.cache_layout import CacheLayout
from vkvx.errors import BundleError, InputError, ModelError, OptionError
from vkvx.format import BASELINE_BITS, BITS
from vkvx.manifest import ModelInfo
from vkvx.models.pictures.limits import PixelLimits
from vkvx.models.registry import locate, read_source
from vkvx.options import QuantizationOptions
from vkvx.packages import missing
from vkvx.runtime.sessions.processor import PLACEHOLDER, Processor

DEFAULT_PICTURES = ((1024, 1024), (1280, 960), (1920, 1080), (1240, 1754))
"""Width and height in pixels: a square, a photograph, a screen, a page at 150 dpi."""
SIDES = (16, 8192)
"""Least and most pixels on a side. Some image processors take minutes for a picture of one pixel by thousands."""


@dataclass(frozen=True)
class PictureCheck:
    """A picture of one size: its visual tokens, these with the padding to whole groups, and bytes by bits."""

    width: int
    height: int
    tokens: int
    padded_tokens: int
    bytes: dict[int, int]


@dataclass(frozen=True)
class ModelCheck:
    """Whether a checkpoint can be exported. ``reason`` says why not; then the rest is empty.

    ``family`` is its title, ``decoder`` the model type of the decoder.
    """

    name: str
    supported: bool
    reason: str | None = None
    family: str | None = None
    decoder: str | None = None
    group_size: int | None = None
    model: ModelInfo | None = None
    pictures: tuple[PictureCheck, ...] = ()


def check_model(
    name: str | Path,
    pictures: Sequence[tuple[int, int]] = DEFAULT_PICTURES,
    *,
    dtype: str = "float16",
    group_size: str | int = "auto",
    min_pixels: int | None = None,
    max_pixels: int | None = None,
    cache_dir: str | Path | None = None,
    revision: str | None = None,
    trust_remote_code: bool = False,
) -> ModelCheck:
    """Check a model. Nothing but the config and processor files of a hub model is downloaded; torch is not needed.

    Args:
        name: as in :func:`vkvx.export_model`.
        pictures: width and height in pixels of pictures whose tokens and bytes are wanted.
        dtype: of the cache at 16 bits; the packed cache has the same size in each.
        group_size: as in :class:`vkvx.ExportOptions`.
        min_pixels, max_pixels: as in :class:`vkvx.ExportOptions`.
        cache_dir, revision, trust_remote_code: as in transformers.

    Raises:
        OptionError: for a size of pictures or groups, or limits of pixels, that are not supported.
        ModelError: if there is no such checkpoint or it cannot be downloaded; what cannot be exported is no error here.
        DependencyError: without a package that is needed.
    """
    for width, height in pictures:
        check_size(width, height)
    given = QuantizationOptions(group_size=group_size)
    options = [given.with_bits(bits) for bits in (*BITS, BASELINE_BITS)]
    for option in options:
        option.check()
    limits = PixelLimits(min_pixels, max_pixels)
    limits.check()
    place = locate(name, cache_dir=cache_dir, revision=revision)
    try:
        source = replace(read_source(place, trust_remote_code), limits=limits)
        info = source.info(dtype)
        processor = Processor.of_checkpoint(source, info)
        tokens = [_tokens(processor, *size) for size in pictures]
    except ModelError as error:
        return ModelCheck(place.name, False, str(error))
    settings = [option.resolve(info.cached_layers, info.typical_tokens) for option in options]
    layouts = {option.bits: CacheLayout(info, setting) for option, setting in zip(options, settings, strict=True)}
    size = settings[0].group_size
    rows = (
        PictureCheck(
            *(width, height, count, math.ceil(count / size) * size),
            {bits: layout.visual_bytes_per_picture(count) for bits, layout in layouts.items()},
        )
        for (width, height), count in zip(pictures, tokens, strict=True)
    )
    return ModelCheck(
        name=place.name,
        supported=True,
        family=source.family.title,
        decoder=source.config.text_config.model_type,
        group_size=size,
        model=info,
        pictures=tuple(rows),
    )


def check_size(width: int, height: int) -> None:
    """Raise OptionError unless a picture may have this size."""
    least, most = SIDES
    if not (least <= width <= most and least <= height <= most):
        raise OptionError(
            f"pictures= (--picture) of {width}x{height} pixels are not supported; "
            f"give {least} to {most} pixels on each side"
        )


def _tokens(processor: Processor, width: int, height: int) -> int:
    """Visual tokens that the image processor makes of a blank picture."""
    try:
        from PIL import Image
    except ImportError as error:
        raise missing("PIL", error) from error
    try:
        return processor.prepare(PLACEHOLDER, [Image.new("RGB", (width, height))]).picture_lengths[0]
    except (InputError, BundleError) as error:
        raise ModelError(f"a picture of {width}x{height} pixels: {error}") from error
