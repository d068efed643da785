"""Which frames of a video are taken and what size they get, against transformers' own video processors."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers.video_utils import VideoMetadata
from video_reference import video_class

from vkvx.errors import InputError, ModelError
from vkvx.models.pictures.anyres import AnyRes
from vkvx.models.pictures.grid import Grid
from vkvx.models.preset_processors import write_processor
from vkvx.models.presets import preset_config
from vkvx.models.processor_files import ProcessorFiles
from vkvx.models.videos import FILE, Videos, open_videos, read_settings

KINDS = {"tiny-qwen2-vl": "qwen2_vl", "tiny-qwen3-vl": "qwen3_vl"}
SIZES = ((480, 640), (1080, 1920), (90, 150), (30, 700), (13, 40), (720, 1280))
SETTINGS: list[dict[str, Any]] = [
    {},
    {"fps": 1.5, "do_sample_frames": True},
    {"fps": None, "num_frames": 9, "do_sample_frames": True},
    {"fps": 2, "do_sample_frames": True, "min_frames": 6, "max_frames": 21},
    {"cap_pixels_per_frame": True, "max_video_tokens": 200},
    {"size": {"shortest_edge": 4096, "longest_edge": 25165824}},
]


def files(directory: Path, preset: str, settings: dict[str, Any]) -> ProcessorFiles:
    write_processor(directory, preset_config(preset))
    (directory / FILE).write_text(json.dumps(settings))
    return ProcessorFiles.load(directory)


def opened(directory: Path, preset: str, settings: dict[str, Any]) -> Videos:
    found = files(directory, preset, settings)
    stamp = "<|vision_start|>" if "qwen3" in preset else ""
    videos = open_videos(Grid(2, video_mark="<|video_pad|>", frame_start=stamp), found.videos, found.images)
    assert videos is not None
    return videos


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
@pytest.mark.parametrize("preset", KINDS)
def test_frames_and_sizes(preset: str, settings: dict[str, Any], tmp_path: Path) -> None:
    given = {**settings, "patch_size": preset_config(preset).vision_config.patch_size}
    ours, theirs = opened(tmp_path, preset, given), video_class(KINDS[preset])(**given)
    for total in (2, 3, 5, 24, 97, 301, 1800):
        for rate in (2.0, 23.976, 30.0):
            for fps in (None, 0.5, 3):
                if fps is None and not ours.do_sample_frames:
                    expected = np.arange(total)
                else:
                    facts = VideoMetadata(total_num_frames=total, fps=rate)
                    fixed: dict[str, Any] = {"fps": theirs.fps, "num_frames": theirs.num_frames}
                    if fps is not None:
                        fixed = {"fps": fps}
                    if fps is not None and ours.num_frames:
                        continue  # transformers refuses both
                    try:
                        expected = np.asarray(theirs.sample_frames(facts, **fixed))
                    except (ValueError, ZeroDivisionError):
                        with pytest.raises(InputError):
                            ours.frames(total, rate, fps)
                        continue
                np.testing.assert_array_equal(ours.frames(total, rate, fps), expected)
        for size in SIZES:
            video = torch.zeros(1, total, 3, 1, 1).expand(1, total, 3, *size)
            theirs.__class__.__mro__[2].resize = lambda self, image, size, resample, **_: (size.height, size.width)
            limits = {"factor": 2 * ours.patch_size, "cap_pixels_per_frame": ours.cap_pixels_per_frame}
            expected_size = theirs.resize(video, theirs.size, 3, temporal_factor=2, **limits)
            assert ours.resized(total, *size) == expected_size


def test_where_settings_are_looked_for(tmp_path: Path) -> None:
    assert read_settings(tmp_path) is None
    for name, value in (("preprocessor_config.json", 1), (FILE, 2)):
        (tmp_path / name).write_text(json.dumps({"fps": value}))
        assert read_settings(tmp_path) == {"fps": value}
    (tmp_path / "processor_config.json").write_text(json.dumps({"video_processor": {"fps": 3}}))
    assert read_settings(tmp_path) == {"fps": 3}


@pytest.mark.parametrize("settings", [{}, {"num_frames": 7, "do_sample_frames": True}], ids=str)
def test_frames_of_one_size(settings: dict[str, Any], tmp_path: Path) -> None:
    """LLaVA-OneVision's frames have the size of a tile."""
    found = files(tmp_path, "tiny-llava-onevision", {**settings, "size": {"height": 60, "width": 60}})
    videos = open_videos(AnyRes(4, 60, "1x1", 2, video_mark="<video>"), found.videos, found.images)
    theirs = video_class("llava_onevision")(**settings)
    assert videos is not None
    assert videos.resized(3, 480, 640) == (60, 60)
    for total in (8, 24, 301):
        for fps in (None, 0.5, 1.0):
            if fps is None and not settings:
                expected = np.arange(total)
            else:
                fixed = {"num_frames": theirs.num_frames} if fps is None else {"fps": fps}
                metadata = VideoMetadata(total_num_frames=total, fps=30.0)
                theirs.num_frames = None
                expected = np.asarray(theirs.sample_frames(metadata, **fixed))
                theirs.num_frames = settings.get("num_frames")
            np.testing.assert_array_equal(videos.frames(total, 30.0, fps), expected)
    with pytest.raises(InputError, match="give a lower fps="):
        videos.frames(3, 1.0, 2.0)
    with pytest.raises(ModelError, match="frames get the size"):
        open_videos(AnyRes(4, 60, "1x1", 2, video_mark="<video>"), {}, found.images)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"patch_size": 8}, "patch_size is 8 for videos and 14 for pictures"),
        ({"do_resize": False}, "do_resize false is not supported"),
        ({"size": {"shortest_edge": 10, "longest_edge": 5}}, "no pair of limits"),
    ],
)
def test_settings_that_do_not_do(settings: dict[str, Any], words: str, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=words):
        opened(tmp_path, "tiny-qwen2-vl", settings)


def test_limits_by_older_names(tmp_path: Path) -> None:
    videos = opened(tmp_path, "tiny-qwen2-vl", {"min_pixels": 3136, "max_pixels": 50000, "size": {"max_pixels": 7}})
    assert (videos.size["shortest_edge"], videos.size["longest_edge"]) == (3136, 50000)


def test_videos_too_short_or_too_narrow(tmp_path: Path) -> None:
    videos = opened(tmp_path, "tiny-qwen3-vl", {})
    with pytest.raises(InputError, match="a video of 1 frame is too short"):
        videos.resized(1, 480, 640)
    with pytest.raises(InputError, match="too long and narrow"):
        videos.resized(2, 32, 32 * 201)
    with pytest.raises(InputError, match="nobody knows how many frames a second there are"):
        videos.frames(10, None, None)
