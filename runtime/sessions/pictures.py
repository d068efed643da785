"""Pictures of a user: paths, or images of Pillow."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Union

from vkvx.errors import InputError
from vkvx.packages import missing

if TYPE_CHECKING:
    from PIL.Image import Image

Picture = Union[str, Path, "Image"]
Pictures = Picture | Sequence[Picture] | None


def listed(pictures: Pictures) -> list[Picture]:
    """None, one picture or several, as a list."""
    if pictures is None:
        return []
    return list(pictures) if isinstance(pictures, (list, tuple)) else [pictures]  # type: ignore[list-item]


def load_picture(source: Picture) -> Image:
    """Read a picture (a path, or an image of Pillow) as RGB, turned upright by its EXIF orientation.

    Raises InputError, which names the file, if it is missing, no picture, damaged, or has absurdly many pixels.
    """
    try:
        from PIL import Image, ImageOps
    except ImportError as error:
        raise missing("PIL", error) from error
    if isinstance(source, Image.Image):
        image, name = source, "the picture"
    elif isinstance(source, (str, Path)):
        image, name = None, str(source)
        if not Path(source).is_file():
            raise InputError(f"no picture at {name}; give the path of an image file")
    else:
        raise InputError(f"a picture must be a path or a PIL image, got {type(source).__name__}")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            if image is None:
                with Image.open(name) as opened:
                    return ImageOps.exif_transpose(opened).convert("RGB")
            return ImageOps.exif_transpose(image).convert("RGB")
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise InputError(f"{name} has more than {Image.MAX_IMAGE_PIXELS} pixels; give a smaller picture") from error
    except PermissionError as error:
        raise InputError(f"cannot read {name}: {error.strerror}") from error
    except Exception as error:  # decoders of damaged files raise OSError, SyntaxError, ValueError, zlib.error, ...
        raise InputError(
            f"{name} cannot be read as a picture ({first_line(error)}); give a PNG, JPEG or WebP file"
        ) from error


def first_line(error: BaseException) -> str:
    """The first line of an error's text, or its class."""
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
