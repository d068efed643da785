"""What all ways to turn pictures into tokens have in common.

A picture stands in a prompt as one placeholder. What takes its place is text: the model's image token once for each
visual token, and whatever marks the family puts around and between them. The whole prompt is tokenised afterwards, as
transformers' processors do it, so that the tokens are theirs.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import numpy as np

from vkvx.errors import InputError
from vkvx.manifest import TensorSpec

KERNELS = {"bilinear": 2, "bicubic": 4}
"""Kernels that resample a grid of positions or features, and the taps that each takes on an axis."""


@dataclass(frozen=True)
class Encoded:
    """A picture, ready: inputs of the vision graph, its number of visual tokens, and its ``text`` in a prompt.

    ``positions`` INT32 [3, tokens] are where each visual token is in time, rows and columns, from 0: for models whose
    rotary embedding tells these apart; those of what follows go on by ``advance`` (None: behind the largest of these).
    ``size`` is the picture's height and width in pixels, before it was resized.
    """

    arrays: dict[str, np.ndarray]
    tokens: int
    text: str
    positions: np.ndarray | None = None
    size: tuple[int, int] = (0, 0)
    advance: int | None = None

    @property
    def digest(self) -> bytes:
        """SHA-256 of the inputs of the vision graph: names, types, shapes and contents."""
        found = hashlib.sha256()
        for name, array in sorted(self.arrays.items()):
            found.update(f"{name} {array.dtype} {array.shape} ".encode())
            found.update(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)
        return found.digest()


@dataclass(frozen=True)
class Taken:
    """Which frames of a video are taken: INT ``indices`` [n] of ``total``, of which there are ``rate`` in a second."""

    indices: np.ndarray
    total: int
    rate: float | None

    def seconds(self, temporal: int) -> list[float]:
        """When each ``temporal`` frames are, the mean of the first and the last; 0 where nobody knows."""
        last = int(self.indices[-1])
        indices = [*self.indices.tolist(), *[last] * (-len(self.indices) % temporal)]
        times = [index / (self.rate or math.inf) for index in indices]
        return [(times[i] + times[i + temporal - 1]) / 2 for i in range(0, len(times), temporal)]

    def interval(self, temporal: int) -> float:
        """Seconds from one of them to the next."""
        return temporal / (len(self.indices) / self.total * (self.rate or math.inf))


class Pictures(Protocol):
    """One way to turn pictures into tokens; made by ``kinds.open_pictures``."""

    @property
    def limited(self) -> bool:
        """Whether the image processor keeps the pixels of a picture within limits (``limits.PixelLimits``)."""

    @property
    def call_options(self) -> Mapping[str, Any]:
        """What the image processor is to be called with, besides the picture."""

    def encode(self, features: Mapping[str, Any], image_token: str) -> Encoded:
        """One picture, from what the image processor gives for it alone (NumPy arrays and lists).

        Raises InputError for features that the model's vision graph cannot take.
        """

    def join(self, pictures: Sequence[Encoded]) -> tuple[dict[str, np.ndarray], ...]:
        """Inputs of the vision graph for each of its calls that pictures take, in order."""

    def largest(self, tokens: int) -> dict[str, int]:
        """The most of each symbol in the vision graph's inputs, in a call for pictures of so many tokens."""

    def example(self, inputs: Sequence[TensorSpec], tokens: int) -> Encoded:
        """A made-up picture of about so many tokens, without a text; pixels are a fixed pattern from -1 to 1."""


class Marked(Protocol):
    """Pictures that the tokens of a prompt tell apart."""

    def split(self, token_ids: np.ndarray, visual: np.ndarray) -> tuple[int, ...]:
        """Visual tokens of each picture in a row of INT tokens [n], of which BOOL ``visual`` [n] are visual.

        Raises InputError if they are not made of whole pictures.
        """


@runtime_checkable
class Sized(Protocol):
    """Pictures that may follow each other without a mark; their sizes, ``image_sizes``, tell them apart."""

    def tokens(self, height: int, width: int) -> int:
        """Visual tokens of a picture of so many pixels, as ``image_sizes`` of transformers have them."""


@runtime_checkable
class Filmed(Protocol):
    """Pictures that may also be frames of videos."""

    @property
    def video_mark(self) -> str:
        """The token that stands for a video in a chat template; "" where there are no videos."""

    @property
    def frame_start(self) -> str:
        """What stands before each frame of a video, behind its time; "" where frames follow each other."""

    def frame_tokens(self, height: int, width: int, patch_size: int) -> int:
        """Visual tokens of the frames that share patches of ``patch_size`` pixels, each of so many pixels."""

    @property
    def frame_options(self) -> Mapping[str, Any]:
        """What the image processor is to be called with for a frame of a video, which has its size already."""

    def encode_video(
        self, frames: Iterable[Mapping[str, Any]], taken: Taken, image_token: str, temporal: int, patch_size: int
    ) -> Iterator[Encoded]:
        """The pictures of a video one after another, from what the image processor gives for each frame taken.

        ``temporal`` frames share patches of ``patch_size`` pixels.
        """


def prompt_positions(visual: np.ndarray, pictures: Sequence[Encoded]) -> np.ndarray | None:
    """Positions INT32 [3, n] of a prompt whose BOOL ``visual`` [n] tokens are those of the pictures, from 0.

    A picture has the positions of its tokens behind those before it; what follows goes on as its ``advance`` says.
    None where the pictures have none.
    """
    if not pictures or pictures[0].positions is None:
        return None
    pieces, start, done, places = [], 0, 0, np.flatnonzero(visual)
    taken = 0
    for picture in pictures:
        assert picture.positions is not None
        first = int(places[taken])
        pieces.append(np.tile(np.arange(start, start + first - done), (3, 1)))
        start += first - done
        pieces.append(picture.positions + start)
        start = int(pieces[-1].max()) + 1 if picture.advance is None else start + picture.advance
        taken, done = taken + picture.tokens, first + picture.tokens
    pieces.append(np.tile(np.arange(start, start + len(visual) - done), (3, 1)))
    return np.concatenate(pieces, axis=1).astype(np.int32)


def pattern(shape: Sequence[int], dtype: str) -> np.ndarray:
    """A fixed wave from -1 to 1, FP32 where ``dtype`` is bfloat16."""
    count = int(np.prod(shape))
    wave = np.arange(count, dtype=np.int64) * 7919 % 509 / 254.0 - 1
    return wave.astype(np.float32 if dtype == "bfloat16" else dtype).reshape(shape)


def taps(
    index: np.ndarray, size: int, entries: int, kernel: str, *, corners: bool = False
) -> tuple[np.ndarray, np.ndarray]:
    """Which of the ``entries`` of an axis make places ``index`` INT [n] once they are resampled to ``size``.

    Returns INT64 [n, taps] and their FP32 weights. The centre of the first is at one half, as in images; with
    ``corners`` the first and last places are the first and last entries.
    """
    count, place = KERNELS[kernel], index.astype(np.float32)
    if corners:
        source = place * np.float32(entries - 1) / np.float32(max(size - 1, 1))
    else:
        source = (place + np.float32(0.5)) * np.float32(entries) / np.float32(size) - np.float32(0.5)
    floor = np.floor(source)
    offsets = np.arange(count) - (count // 2 - 1)
    chosen = floor.astype(np.int64)[:, None] + offsets
    distance = np.abs(source[:, None] - floor[:, None] - offsets.astype(np.float32))
    if kernel == "bilinear":
        weights = np.maximum(1 - distance, 0)
    else:  # Keys' kernel with a = -0.75, as torch has it
        a = np.float32(-0.75)
        near = ((a + 2) * distance - (a + 3)) * distance * distance + 1
        far = ((a * distance - 5 * a) * distance + 8 * a) * distance - 4 * a
        weights = np.where(distance <= 1, near, far)
    return np.clip(chosen, 0, entries - 1), weights


def runs(visual: np.ndarray) -> list[tuple[int, int]]:
    """First and past-the-last index of each run of True."""
    edges = np.flatnonzero(np.diff(np.concatenate([[False], visual, [False]]).astype(np.int8)))
    return [(int(start), int(end)) for start, end in edges.reshape(-1, 2)]


def check_whole(lengths: Sequence[int], tokens: int, tile_tokens: int) -> None:
    if sum(lengths) != tokens or any(length % tile_tokens for length in lengths):
        raise InputError(
            f"{tokens} visual tokens in a row are not made of whole pictures of {tile_tokens} tokens a tile; "
            "give each picture in one call"
        )
