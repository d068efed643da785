"""Pictures of a user: paths, bytes, arrays, or images of Pillow."""

from __future__ import annotations

import io
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO, Union

import numpy as np

from vkvx.errors import InputError
from vkvx.packages import missing

if TYPE_CHECKING:
    from PIL.Image import Image

Picture = Union[str, Path, bytes, BinaryIO, "np.ndarray", "Image"]
"""A path, the bytes of a file, an open file, UINT8 [H, W], [H, W, 3] or [H, W, 4], or an image of Pillow."""
Pictures = Picture | Sequence[Picture] | None
WHITE = (255, 255, 255)
MAX_STREAM = 1 << 30
"""Most bytes of a picture that comes through a pipe."""
MAX_RATIO = 200
"""Of the sides of a picture. The shorter one may be scaled up to hundreds of pixels, and the longer with it."""


def listed(pictures: Pictures) -> list[Picture]:
    """None, one picture or several, as a list."""
    if pictures is None:
        return []
    return list(pictures) if isinstance(pictures, (list, tuple)) else [pictures]  # type: ignore[list-item]


def load_picture(source: Picture, *, background: tuple[int, int, int] = WHITE, name: str = "the picture") -> Image:
    """Read a picture as RGB: upright by its EXIF orientation, 16 bits scaled to 8, what is transparent on a background.

    ``name`` is for messages about what has no path. Raises InputError if the picture is missing, none, damaged, has
    absurdly many pixels, or is more than ``MAX_RATIO`` times as long as it is wide; nothing of it is decoded then.
    """
    try:
        from PIL import Image, UnidentifiedImageError
    except ImportError as error:
        raise missing("PIL", error) from error
    if isinstance(source, (str, Path)):
        name = str(source)
        if not Path(source).exists() or Path(source).is_dir():
            raise InputError(f"no picture at {name}; give the path of an image file")
    try:
        if isinstance(source, Image.Image):
            return _as_rgb(source, background, name)
        if isinstance(source, np.ndarray):
            return _as_rgb(Image.fromarray(source), background, name)
        if isinstance(source, (str, Path)) and Path(source).is_fifo():
            with Path(source).open("rb") as pipe:
                source = _read_through(pipe, name)
        elif not isinstance(source, (str, Path, bytes)) and not source.seekable():
            source = _read_through(source, name)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # _as_rgb looks at the size
            opened = Image.open(io.BytesIO(source) if isinstance(source, (bytes, bytearray)) else source)
        with opened:
            return _as_rgb(opened, background, name)
    except InputError:
        raise
    except Image.DecompressionBombError as error:
        raise _too_large(name) from error
    except UnidentifiedImageError as error:  # its text holds an address
        raise InputError(f"{name} cannot be read as a picture; give a PNG, JPEG or WebP file") from error
    except PermissionError as error:
        raise InputError(f"cannot read {name}: {error.strerror}") from error
    except (AttributeError, TypeError) as error:
        kinds = "a path, bytes, an open file, a UINT8 array or a PIL image"
        raise InputError(f"{name} must be {kinds}, got {type(source).__name__} ({first_line(error)})") from error
    except Exception as error:  # decoders of damaged files raise OSError, SyntaxError, ValueError, zlib.error, ...
        raise InputError(
            f"{name} cannot be read as a picture ({first_line(error)}); give a PNG, JPEG or WebP file"
        ) from error


def _read_through(stream: BinaryIO, name: str) -> bytes:
    """All of what can be read only once."""
    found = bytearray()
    while block := stream.read(1 << 20):
        found += block
        if len(found) > MAX_STREAM:
            raise InputError(f"{name} gives more than {MAX_STREAM} bytes; give the path of a smaller picture")
    return bytes(found)


def _as_rgb(image: Image, background: tuple[int, int, int], name: str) -> Image:
    from PIL import Image as pillow

    width, height = image.size
    if width * height > (pillow.MAX_IMAGE_PIXELS or 1 << 62):
        raise _too_large(name)
    if max(width, height) > MAX_RATIO * min(width, height):
        raise InputError(
            f"{name} has {width} x {height} pixels, one side over {MAX_RATIO} times the other; give a part of it"
        )
    turn = _TURNS.get(image.getexif().get(0x0112) or 1)
    if image.mode.startswith("I"):  # 16 bits, also where Pillow opens them as 32
        grey = np.asarray(image, np.int64)
        if image.mode != "I" or grey.max(initial=0) > 255:
            grey = (grey * 255 + 32767) // 65535
        image = pillow.fromarray(grey.clip(0, 255).astype(np.uint8))
    elif image.has_transparency_data:
        front = image.convert("RGBA")
        image = pillow.alpha_composite(pillow.new("RGBA", front.size, (*background, 255)), front)
    image = image.convert("RGB")
    return image if turn is None else image.transpose(pillow.Transpose[turn])


_TURNS = {
    2: "FLIP_LEFT_RIGHT",
    3: "ROTATE_180",
    4: "FLIP_TOP_BOTTOM",
    5: "TRANSPOSE",
    6: "ROTATE_270",
    7: "TRANSVERSE",
    8: "ROTATE_90",
}
"""By EXIF orientation: what turns a picture upright (Exif 2.3, tag 0x0112)."""


def _too_large(name: str) -> InputError:
    from PIL import Image

    return InputError(f"{name} has more than {Image.MAX_IMAGE_PIXELS} pixels; give a smaller picture")


def first_line(error: BaseException) -> str:
    """The first line of an error's text, as much of it as somebody reads, or its class."""
    lines = str(error).strip().splitlines()
    return lines[0][:300] if lines else type(error).__name__
