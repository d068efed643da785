"""How videos become frames of pixels: which frames are taken, and what size they get. Numbers alone, no torch.

The rules are those of transformers' video processors, which cannot be loaded without torchvision: their settings are
read from the checkpoint's files, and :class:`Paced`, :class:`Stamped` and :class:`Scaled` follow
``Qwen2VLVideoProcessor``, ``Qwen3VLVideoProcessor`` and ``LlavaOnevisionVideoProcessor``.
"""

from __future__ import annotations

import json
import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from vkvx.errors import InputError, ModelError
from vkvx.models.pictures.anyres import AnyRes
from vkvx.models.pictures.base import Filmed, Pictures

FILE = "video_preprocessor_config.json"
_NESTED, _IMAGES = "processor_config.json", "preprocessor_config.json"
_CLIP_MEAN, _CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
_STEEPEST = 200
"""Most that a side of a frame may be of the other."""


def read_settings(directory: Path) -> dict[str, Any] | None:
    """Settings of the video processor in a directory, where transformers looks for them; None if there are none.

    Raises OSError and ValueError for damaged files.
    """
    nested = _read(directory / _NESTED).get("video_processor")
    if isinstance(nested, dict):
        return nested
    # Older checkpoints have one file for pictures and videos.
    return _read(directory / FILE) or _read(directory / _IMAGES) or None


def _read(path: Path) -> dict[str, Any]:
    data = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    return data if isinstance(data, dict) else {}


@dataclass(frozen=True)
class Videos(ABC):
    """Settings of a video processor, by the names that their files have.

    ``size`` are the least and most pixels of a frame (:class:`Paced`) or of all frames together (:class:`Stamped`), or
    those of each side (:class:`Scaled`);
    with ``cap_pixels_per_frame`` there is a bound on the other, too, which ``max_video_tokens`` tells.
    """

    size: Mapping[str, int]
    patch_size: int
    image_mean: tuple[float, ...]
    image_std: tuple[float, ...]
    do_sample_frames: bool
    fps: float | None
    max_video_tokens: int = 0
    num_frames: int | None = None
    min_frames: int = 4
    max_frames: int = 768
    merge_size: int = 2
    temporal_patch_size: int = 2
    cap_pixels_per_frame: bool | None = None
    resample: int = 3
    rescale_factor: float = 1 / 255
    defaults: ClassVar[Mapping[str, Any]]
    limits_by_name: ClassVar[bool] = False
    """Whether ``min_pixels`` and ``max_pixels`` stand for entries of ``size``."""

    @classmethod
    def of(cls, given: Mapping[str, Any], images: Any) -> Videos:
        """From the contents of a file. Raises ModelError if they do not suit, or do not fit the image processor."""
        nullable = ("fps", "num_frames")
        known = {name: given[name] for name in cls.__dataclass_fields__ if name in given}
        known = {name: value for name, value in known.items() if value is not None or name in nullable}
        size = dict(known.get("size", cls.defaults["size"]))
        if cls.limits_by_name:
            for old, name in (("min_pixels", "shortest_edge"), ("max_pixels", "longest_edge")):
                size[name] = given.get(old) or size.get(name, 0)
        made = cls(**{**cls.defaults, **known, "size": size})
        made._check(given, images)
        return made

    def _check(self, given: Mapping[str, Any], images: Any) -> None:
        for name in ("do_resize", "do_rescale", "do_normalize"):
            if given.get(name) is False:
                raise ModelError(f"a video processor with {name} false is not supported; fix {FILE}")
        self._check_size(images)

    def _check_size(self, images: Any) -> None:
        if not 0 < self.size.get("shortest_edge", 0) <= self.size.get("longest_edge", 0):
            raise ModelError(f"size {dict(self.size)} of the video processor is no pair of limits; fix {FILE}")
        for name in ("patch_size", "merge_size", "temporal_patch_size"):
            ours, theirs = getattr(self, name), getattr(images, name)
            if ours != theirs:
                raise ModelError(f"{name} is {ours} for videos and {theirs} for pictures; fix {FILE}")

    @property
    def unit(self) -> int:
        """Pixels of a visual token on each side."""
        return self.patch_size * self.merge_size

    def frames(self, total: int, rate: float | None, fps: float | None) -> np.ndarray:
        """Which frames INT [n] are taken of so many, of which there are ``rate`` in a second.

        ``fps``, if given, takes so many a second, whatever the settings say. Raises InputError where that is none.
        """
        if fps is None and not self.do_sample_frames:
            return np.arange(total)
        count = self.num_frames if fps is None else None
        wanted = self.fps if fps is None else fps
        if count is None and wanted is not None and rate is None:
            raise InputError("nobody knows how many frames a second there are; give pictures, with fps= (--fps)")
        return self._sampled(total, None if rate is None or wanted is None else total / rate * wanted, count)

    @abstractmethod
    def _sampled(self, total: int, wanted: float | None, count: int | None) -> np.ndarray:
        """``wanted`` is what a rate asks for, before limits; ``count`` is a fixed number."""

    @abstractmethod
    def resized(self, frames: int, height: int, width: int) -> tuple[int, int]:
        """Height and width that frames of so many pixels get. Raises InputError for frames without a size."""

    def _fitted(self, height: float, width: float, least: int, most: int, frames: int, counted: int) -> tuple[int, int]:
        """Whole tokens on each side, so that ``frames`` have at least and at most so many pixels."""
        if max(height, width) > _STEEPEST * min(height, width):
            raise InputError(f"frames of {width} x {height} pixels are too long and narrow; cut them")
        sides = [round(side / self.unit) for side in (height, width)]
        area = counted * math.prod(sides) * self.unit**2
        if area > most:
            scale = math.sqrt(frames * height * width / most)
            sides = [max(1, math.floor(side / scale / self.unit)) for side in (height, width)]
        elif area < least:
            scale = math.sqrt(least / (frames * height * width))
            sides = [math.ceil(side * scale / self.unit) for side in (height, width)]
        return sides[0] * self.unit, sides[1] * self.unit


@dataclass(frozen=True)
class Paced(Videos):
    """Qwen2-VL and Qwen2.5-VL: all frames unless told otherwise, limits of each frame."""

    defaults = {
        "size": {"shortest_edge": 128 * 28**2, "longest_edge": 768 * 28**2},
        "patch_size": 14,
        "image_mean": _CLIP_MEAN,
        "image_std": _CLIP_STD,
        "do_sample_frames": False,
        "fps": None,
        "max_video_tokens": 128000,
    }
    limits_by_name = True

    def _sampled(self, total: int, wanted: float | None, count: int | None) -> np.ndarray:
        step = self.temporal_patch_size
        if count is not None:
            chosen = round(count / step) * step
        elif wanted is not None:
            most = min(self.max_frames, total) // step * step
            chosen = math.floor(min(max(wanted, self.min_frames), most, total) / step) * step
        else:
            return np.arange(total)
        if not 0 < chosen <= total:
            raise InputError(f"{chosen} frames cannot be taken of a video of {total}; give a longer video, or pictures")
        every = total / chosen
        # In FP32, as torch counts: a step may fall just below a whole number.
        return (np.arange(math.ceil(total / every)) * every).astype(np.float32).astype(np.int64)

    def resized(self, frames: int, height: int, width: int) -> tuple[int, int]:
        """Each frame for itself."""
        least, most = self.size["shortest_edge"], self.size["longest_edge"]
        if self.cap_pixels_per_frame:
            budget = int(self.max_video_tokens * self.unit**2 * 0.9)
            most = max(min(most, budget * self.temporal_patch_size // frames), int(least * 1.05))
        return self._fitted(height, width, least, most, 1, 1)


@dataclass(frozen=True)
class Stamped(Videos):
    """Qwen3-VL: two frames a second unless told otherwise, limits of all frames together."""

    defaults = {
        "size": {"shortest_edge": 128 * 32**2, "longest_edge": 768 * 32**2},
        "patch_size": 16,
        "image_mean": (0.5, 0.5, 0.5),
        "image_std": (0.5, 0.5, 0.5),
        "do_sample_frames": True,
        "fps": 2,
        "max_video_tokens": 768,
    }

    def _sampled(self, total: int, wanted: float | None, count: int | None) -> np.ndarray:
        if count is None:
            count = min(max(int(total if wanted is None else wanted), self.min_frames), self.max_frames)
            count = count if wanted is None else min(count, total)
        return np.linspace(0, total - 1, count).round().astype(np.int64)

    def resized(self, frames: int, height: int, width: int) -> tuple[int, int]:
        """All frames share the limits; what is smaller than a token is enlarged first."""
        step = self.temporal_patch_size
        if frames < step:
            raise InputError(f"a video of {frames} frame is too short for this model; give {step} frames, or a picture")
        least, most = self.size["shortest_edge"], self.size["longest_edge"]
        if self.cap_pixels_per_frame:
            frame = max(min(self.max_video_tokens * self.unit**2, most // frames), int(least * 1.05))
            most = frame * frames
        if min(height, width) < self.unit:
            scale = max(self.unit / height, self.unit / width)
            height, width = int(height * scale), int(width * scale)
        return self._fitted(height, width, least, most, frames, round(frames / step) * step)


@dataclass(frozen=True)
class Scaled(Videos):
    """LLaVA-OneVision: all frames unless told otherwise, each scaled to one size. ``size`` is that of a frame."""

    defaults = {
        "size": {"height": 384, "width": 384},
        "patch_size": 1,
        "merge_size": 1,
        "temporal_patch_size": 1,
        "image_mean": _CLIP_MEAN,
        "image_std": _CLIP_STD,
        "do_sample_frames": False,
        "fps": None,
    }

    def _check_size(self, images: Any) -> None:
        ours, theirs = ({name: size.get(name) for name in ("height", "width")} for size in (self.size, images.size))
        if ours != theirs or None in ours.values():
            raise ModelError(f"frames get the size {ours}, pictures {theirs}; fix {FILE}")

    def _sampled(self, total: int, wanted: float | None, count: int | None) -> np.ndarray:
        if count is None:
            count = total if wanted is None else max(1, int(wanted))
        if count > total:
            raise InputError(f"{count} frames cannot be taken of a video of {total}; give a lower fps= (--fps)")
        return np.arange(count) * total // count

    def resized(self, frames: int, height: int, width: int) -> tuple[int, int]:
        """Always the same."""
        return self.size["height"], self.size["width"]


def open_videos(pictures: Pictures, given: Mapping[str, Any] | None, images: Any) -> Videos | None:
    """How a model with such pictures takes videos; None if it takes none. Raises ModelError as :meth:`Videos.of`."""
    if not isinstance(pictures, Filmed) or not pictures.video_mark:
        return None
    kind = Scaled if isinstance(pictures, AnyRes) else Stamped if pictures.frame_start else Paced
    return kind.of(given or {}, images)
