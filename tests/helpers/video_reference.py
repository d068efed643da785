"""Transformers' own video processors, which ask for torchvision: Pillow resizes in its place, all else is theirs."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
from PIL import Image

KINDS = {
    "qwen2_vl": ("qwen2_vl", "Qwen2VLVideoProcessor"),
    "qwen2_5_vl": ("qwen2_vl", "Qwen2VLVideoProcessor"),
    "llava_onevision": ("llava_onevision", "LlavaOnevisionVideoProcessor"),
    "qwen3_vl": ("qwen3_vl", "Qwen3VLVideoProcessor"),
    "qwen3_5": ("qwen3_vl", "Qwen3VLVideoProcessor"),
}
"""Modules and classes of the video processors, by the model's type."""
_TORCHVISION = (
    "torchvision",
    "torchvision.transforms",
    "torchvision.transforms.v2",
    "torchvision.transforms.v2.functional",
)


def video_class(kind: str) -> Any:
    """The class of a model's type, with Pillow under it."""
    module, name = KINDS[kind]
    with mock.patch.dict(sys.modules, dict.fromkeys(_TORCHVISION, mock.MagicMock())):
        found = getattr(importlib.import_module(f"transformers.models.{module}.video_processing_{module}"), name)
    base = found.__mro__[1]

    class Pillow(base):  # type: ignore[misc, valid-type]
        def resize(self, image: torch.Tensor, size: Any, resample: Any, **_: Any) -> torch.Tensor:
            frames = image.flatten(0, -4).permute(0, 2, 3, 1).numpy()
            done = [Image.fromarray(frame).resize((size.width, size.height), int(resample)) for frame in frames]
            return torch.from_numpy(np.stack(done)).permute(0, 3, 1, 2).unflatten(0, image.shape[:-3])

        def rescale_and_normalize(
            self, images: torch.Tensor, _do: bool, factor: float, _too: bool, mean: Any, std: Any
        ) -> torch.Tensor:
            mean, std = (torch.tensor(values, dtype=torch.float32)[:, None, None] for values in (mean, std))
            return (images.float() * factor - mean) / std

        def convert_to_rgb(self, video: torch.Tensor) -> torch.Tensor:
            return video

    return type(name, (found, Pillow), {})


def video_processor(directory: Path, kind: str) -> Any:
    """That of a checkpoint, with the settings of its files."""
    return video_class(kind).from_pretrained(directory, local_files_only=True)
