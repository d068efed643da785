"""LightOnOCR: the tower and projector of Mistral 3, rows of tokens without marks, a Qwen3 decoder."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from vkvx.errors import ModelError
from vkvx.models.pixtral import Mistral3
from vkvx.models.processor_files import ProcessorFiles


class LightOnOcr(Mistral3):
    """``LightOnOcrForConditionalGeneration``: pictures need not be made of whole tokens."""

    title = "LightOnOCR"
    architecture = "LightOnOcrForConditionalGeneration"
    text_models = tested_models = ("qwen3",)
    aliases = {"lightonocr-1b": "lightonai/LightOnOCR-1B-1025"}
    marks = ()
    parts = ("vision_encoder", "vision_projection")

    def prepare_processor(self, files: ProcessorFiles, config: Any) -> None:
        """The image processor makes pictures of its own patches, which must be made of those of the tower."""
        side, given = config.vision_config.patch_size, files.images.patch_size
        sides = set(given.values()) if isinstance(given, Mapping) else {given}
        if any(own % side for own in sides):
            raise ModelError(
                f"the image processor makes patches of {sorted(sides)} pixels, the vision tower takes {side}; "
                f"fix {files.image_file}"
            )
