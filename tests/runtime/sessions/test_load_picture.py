"""Reading pictures: what is transparent, 16 bits, orientation, where they come from, and what is refused."""

from __future__ import annotations

import io
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from vkvx.errors import InputError
from vkvx.runtime.sessions.pictures import load_picture

RED = (255, 0, 0)
CORNERS = np.array([[10, 20, 30], [40, 50, 60]], np.uint8)
"""A picture that is different after each turn."""


def pixels(source: Any, **options: Any) -> np.ndarray:
    image = load_picture(source, **options)
    assert image.mode == "RGB"
    return np.asarray(image)


def encoded(image: Image.Image, kind: str = "PNG", **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def see_through(mode: str) -> Image.Image:
    """Opaque red beside what is fully transparent, black underneath."""
    image = Image.new("RGBA", (2, 1), (0, 0, 0, 0))
    image.putpixel((0, 0), (*RED, 255))
    return image.convert(mode) if mode != "P" else image.quantize(4)


@pytest.mark.parametrize(
    ("mode", "as_file"), [("RGBA", False), ("RGBA", True), ("P", False), ("P", True), ("PA", False)]
)
def test_what_is_transparent_becomes_white(mode: str, as_file: bool) -> None:
    image = see_through(mode)
    found = pixels(encoded(image) if as_file else image)
    assert found.tolist() == [[list(RED), [255, 255, 255]]]
    assert pixels(image, background=(1, 2, 3))[0, 1].tolist() == [1, 2, 3]


def test_grey_with_alpha_and_colours_that_stand_for_nothing() -> None:
    assert pixels(Image.new("LA", (1, 1), (0, 0)))[0, 0].tolist() == [255] * 3
    assert pixels(Image.new("LA", (1, 1), (100, 128)))[0, 0].tolist() == [177] * 3
    data = encoded(Image.new("RGB", (2, 2), (9, 9, 9)), transparency=(9, 9, 9))
    assert (pixels(data) == 255).all()


def test_sixteen_bits_are_scaled() -> None:
    values = np.array([[0, 1, 128, 257, 32768, 65535]], np.uint16)
    expected = [0, 0, 0, 1, 128, 255]
    assert pixels(encoded(Image.fromarray(values)))[0, :, 0].tolist() == expected
    assert pixels(Image.fromarray(values.astype(np.int32)))[0, :, 0].tolist() == expected
    assert pixels(Image.fromarray(np.array([[0, 7, 200]], np.int32)))[0, :, 0].tolist() == [0, 7, 200]


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("mode", ["L", "LA", "I;16"])
def test_orientations(orientation: int, mode: str) -> None:
    """The eight of Exif, by what they say of row 0 and column 0."""
    turned = {
        1: CORNERS,
        2: CORNERS[:, ::-1],
        3: CORNERS[::-1, ::-1],
        4: CORNERS[::-1],
        5: CORNERS.T,
        6: CORNERS[::-1].T,
        7: CORNERS[::-1, ::-1].T,
        8: CORNERS[:, ::-1].T,
    }[orientation]
    stored = (
        Image.fromarray(CORNERS.astype(np.uint16) * 257) if mode == "I;16" else Image.fromarray(CORNERS).convert(mode)
    )
    exif = Image.Exif()
    exif[0x0112] = orientation
    found = pixels(encoded(stored, exif=exif))
    assert found[..., 0].tolist() == turned.tolist()


def test_where_pictures_come_from(tmp_path: Path) -> None:
    path = tmp_path / "picture.png"
    path.write_bytes(encoded(Image.fromarray(CORNERS)))
    expected = np.stack([CORNERS] * 3, -1).tolist()
    with path.open("rb") as file:
        for source in (
            path,
            str(path),
            path.read_bytes(),
            io.BytesIO(path.read_bytes()),
            file,
            CORNERS,
            Image.open(path),
        ):
            assert pixels(source).tolist() == expected, type(source)
    assert pixels(np.stack([CORNERS] * 3, -1)).tolist() == expected


@pytest.mark.parametrize("opened", [False, True])
def test_too_many_pixels_are_refused_before_they_are_decoded(opened: bool) -> None:
    data = encoded(Image.new("1", (13_000, 13_000)))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        source: Any = Image.open(io.BytesIO(data)) if opened else data
    with pytest.raises(InputError, match=r"^picture 2 has more than 89478485 pixels; give a smaller"):
        load_picture(source, name="picture 2")
    if opened:
        assert source._im is None  # not decoded


@pytest.mark.parametrize("size", [(3000, 1), (1, 201), (20_000, 99)])
def test_thin_pictures_are_refused(size: tuple[int, int]) -> None:
    with pytest.raises(InputError, match=rf"^the picture has {size[0]} x {size[1]} pixels, one side over 200 times"):
        load_picture(Image.new("L", size))
    assert load_picture(Image.new("L", (200, 1))).size == (200, 1)


@pytest.mark.parametrize("source", [7, None, b"", b"no picture", np.zeros((2, 2, 9), np.uint8), object()])
def test_what_is_no_picture_is_named_by_its_place(source: Any) -> None:
    with pytest.raises(InputError, match=r"^picture 3 (must be|cannot be read)") as caught:
        load_picture(source, name="picture 3")
    assert "\n" not in str(caught.value)
    assert "0x" not in str(caught.value)
