"""Frames of videos: of a file, through PyAV, or of pictures that are frames."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from vkvx.errors import InputError
from vkvx.packages import missing
from vkvx.runtime.sessions.pictures import Picture, first_line, load_picture

if TYPE_CHECKING:
    from PIL.Image import Image

Video = str | Path | Sequence[Picture]
"""A video file, a folder of frames in the order of their names, or frames."""

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff", ".gif")
"""Files of a folder that are frames."""


def listed_videos(videos: str | Path | Sequence[Video] | None) -> list[Video]:
    """None, the path of one video, or several videos, as a list."""
    if videos is None:
        return []
    return list(videos) if isinstance(videos, (list, tuple)) else [videos]  # type: ignore[list-item]


_UNSEEN = 2
"""Frames at the end that a file may count and no decoder gives; the last one before stands for them."""


class Clip(ABC):
    """A video that is open for reading: ``total`` frames of ``height`` x ``width``, ``rate`` of them in a second.

    ``rate`` None is unknown. ``sampling`` are the frames a second that were asked for, None if nobody did.
    """

    name: str
    total: int
    rate: float | None
    sampling: float | None
    height: int
    width: int

    @abstractmethod
    def frames(self, indices: np.ndarray) -> Iterator[Image]:
        """The frames INT [n], ascending, in RGB, one after another. Raises InputError for what cannot be read."""


def open_clip(source: Video, fps: float | None = None) -> Clip:
    """Open a video. ``fps`` is how many frames a second are taken of a file, or how many there were of frames.

    Raises InputError if it is missing, empty or damaged, and DependencyError without PyAV for a file.
    """
    if isinstance(source, (str, Path)):
        path = Path(source)
        if path.is_dir():
            found = sorted(entry for entry in path.iterdir() if entry.suffix.lower() in SUFFIXES)
            if not found:
                raise InputError(f"the folder {path} holds no frames; give PNG, JPEG or WebP files, or a video file")
            return _Pictures(found, str(path), fps)
        if not path.is_file():
            raise InputError(f"no video at {path}; give a video file, or a folder of frames")
        return _File(path, fps)
    if not isinstance(source, (list, tuple)):
        raise InputError(f"a video must be a path or a list of frames, got {type(source).__name__}")
    if not source:
        raise InputError("a video has no frames; give at least one")
    return _Pictures(source, "the video", fps)


class _Pictures(Clip):
    def __init__(self, pictures: Sequence[Picture], name: str, fps: float | None) -> None:
        self._pictures = pictures
        self.name, self.total, self.rate, self.sampling = name, len(pictures), fps, None
        first = load_picture(pictures[0])
        self.height, self.width = first.height, first.width

    def frames(self, indices: np.ndarray) -> Iterator[Image]:
        for index in indices.tolist():
            frame = load_picture(self._pictures[index])
            if frame.size != (self.width, self.height):
                raise InputError(
                    f"frame {index} of {self.name} has {frame.width} x {frame.height} pixels, the first one "
                    f"{self.width} x {self.height}; give frames of one size"
                )
            yield frame


class _File(Clip):
    def __init__(self, path: Path, fps: float | None) -> None:
        self._path, self.name, self.sampling = path, str(path), fps
        with self._opened() as (container, stream):
            # Some kinds of files do not say how many frames they have.
            self.total = stream.frames or sum(packet.size > 0 for packet in container.demux(stream))
            self.rate = float(stream.average_rate) if stream.average_rate else None
            self.height, self.width = stream.height, stream.width
        if not self.total:
            raise InputError(f"{path} has no frames; give another video")

    def frames(self, indices: np.ndarray) -> Iterator[Image]:
        wanted, found, image = indices.tolist(), 0, None
        with self._opened() as (container, stream):
            number = -1
            for number, frame in enumerate(container.decode(stream)):
                while found < len(wanted) and wanted[found] == number:
                    image = frame.to_image()
                    yield image
                    found += 1
                if found == len(wanted):
                    return
        if image is None or number + 1 + _UNSEEN < self.total:
            raise InputError(f"{self.name} has {number + 1} frames of the {self.total} that it says; convert it anew")
        yield from [image] * (len(wanted) - found)

    def _opened(self) -> Any:
        return _Opened(self._path)


class _Opened:
    """A file's container and its first video stream; errors inside are an InputError."""

    def __init__(self, path: Path) -> None:
        self._path = path
        try:
            import av
        except ImportError as error:
            raise missing("av", error) from error
        self._errors: Any = (av.FFmpegError, ValueError)
        try:
            self._container: Any = av.open(str(path))
        except self._errors as error:
            raise self._unreadable(error) from error

    def __enter__(self) -> tuple[Any, Any]:
        if not self._container.streams.video:
            self._container.close()
            raise InputError(f"{self._path} has no video stream; give a video file")
        return self._container, self._container.streams.video[0]

    def __exit__(self, kind: Any, error: Any, trace: Any) -> None:
        self._container.close()
        if isinstance(error, self._errors):
            raise self._unreadable(error) from error

    def _unreadable(self, error: BaseException) -> InputError:
        return InputError(f"{self._path} cannot be read as a video ({first_line(error)}); convert it, or give frames")
