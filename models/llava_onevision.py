"""LLaVA-OneVision: LLaVA-NeXT with more tiles, and features of large grids scaled down."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from vkvx.errors import ModelError
from vkvx.models.llava_next import LlavaNext
from vkvx.models.pictures.anyres import AnyRes


class LlavaOneVision(LlavaNext):
    """``LlavaOnevisionForConditionalGeneration``."""

    title = "LLaVA-OneVision"
    architecture = "LlavaOnevisionForConditionalGeneration"
    text_models = tested_models = ("qwen2",)
    aliases = {
        "llava-onevision-0.5b": "llava-hf/llava-onevision-qwen2-0.5b-ov-hf",
        "llava-onevision-7b": "llava-hf/llava-onevision-qwen2-7b-ov-hf",
    }

    def check(self, config: Any) -> None:
        """Refuse other ways with large grids."""
        super().check(config)
        self.most_tiles(config)

    def pictures(self, config: Any) -> AnyRes:
        """Videos are taken, too."""
        return replace(super().pictures(config), video_mark="<video>")

    def most_tiles(self, config: Any) -> int:
        """The number in ``vision_aspect_ratio``, such as "anyres_max_9"."""
        name, _, number = config.vision_aspect_ratio.rpartition("_")
        if name != "anyres_max" or not number.isdecimal() or number == "0":
            raise ModelError(f"vision_aspect_ratio '{config.vision_aspect_ratio}' is not supported; 'anyres_max_9' is")
        return int(number)
