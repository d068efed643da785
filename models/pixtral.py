"""Pixtral, Mistral 3 and Ministral 3: a tower for pictures of any size, patches row by row."""

from __future__ import annotations

from collections.abc import Sequence
from math import ceil
from typing import TYPE_CHECKING, Any

import numpy as np

from vkvx.errors import ModelError
from vkvx.manifest import TensorSpec
from vkvx.models.family import Family, VisionCalls, filled
from vkvx.models.pictures.rows import PatchRows
from vkvx.models.processor_files import ProcessorFiles
from vkvx.models.qwen_vl import USUAL_SIZES

if TYPE_CHECKING:
    from torch import Tensor


class Pixtral(Family):
    """``LlavaForConditionalGeneration`` with a Pixtral tower: every patch is a visual token.

    Its architecture is LLaVA's, so :class:`vkvx.models.llava.Llava` stands for it in the registry.
    """

    title = "Pixtral"
    architecture = "LlavaForConditionalGeneration"
    text_models: tuple[str, ...] = ("mistral",)
    tested_models: tuple[str, ...] = ("mistral",)
    marks: tuple[str, ...] = ("[IMG_BREAK]", "[IMG_END]")
    """Tokens after a row and after the last one; none where rows follow each other."""
    parts = ("vision_tower", "multi_modal_projector")
    """Names of tower and projector."""

    def check(self, config: Any) -> None:
        """Refuse other towers, and other features than those of all patches in the last layer."""
        super().check(config)
        if config.vision_config.model_type != "pixtral":
            raise ModelError(
                f"a {self.title} with a '{config.vision_config.model_type}' tower is not supported; pixtral is"
            )
        known = {"vision_feature_layer": -1, "vision_feature_select_strategy": "full"}
        for name, value in known.items():
            if (found := getattr(config, name, value)) != value:
                raise ModelError(f"a {self.title} with {name} '{found}' is not supported; '{value}' is")

    def merge(self, config: Any) -> int:
        """Side in patches of what makes a visual token."""
        return 1

    def pictures(self, config: Any) -> PatchRows:
        """Rows of patches, with marks behind them."""
        return PatchRows(self.merge(config), config.vision_config.patch_size, *self.marks)

    def typical_tokens(self, config: Any) -> tuple[int, ...]:
        """Of pictures of ``USUAL_SIZES``, scaled down to the size that the tower is made for."""
        vision, found = config.vision_config, set()
        side = vision.patch_size * self.merge(config)
        for size in USUAL_SIZES:
            ratio = max(1, max(size) / vision.image_size)
            rows, columns = (ceil(int(length / ratio) / side) for length in size)
            found.add(rows * columns)
        return tuple(sorted(found))

    def pixel_inputs(self, config: Any) -> tuple[TensorSpec, ...]:
        """Patches ``pixel_values``, and the geometry of the picture that :class:`PatchRows` tells."""
        pictures = self.pictures(config)
        shape = (pictures.pixel_rows, config.vision_config.num_channels, pictures.patch, pictures.patch)
        return (TensorSpec("pixel_values", "float32", shape), *pictures.inputs())

    def image_embeds(self, model: Any, *pixel_inputs: Tensor, **constants: Tensor) -> Tensor:
        """Tower and projector: patches of one picture all attend to each other; which are merged says an index."""
        pixels, positions, *merge_index = pixel_inputs
        tower, projector = (getattr(model.model, name) for name in self.parts)
        hidden = tower.ln_pre(tower.patch_conv(pixels).flatten(1).unsqueeze(0))
        turns = tower.patch_positional_embedding(hidden, positions)
        hidden = tower.transformer(hidden, attention_mask=None, position_embeddings=turns).last_hidden_state[0]
        for index in merge_index:  # one, or none in Pixtral
            patches = projector.norm(hidden).index_select(0, index.flatten()).unflatten(0, (-1, index.shape[1]))
            hidden = projector.patch_merger.merging_layer(patches.transpose(1, 2).flatten(1))
        return projector.linear_2(projector.act(projector.linear_1(hidden)))

    def prepare_processor(self, files: ProcessorFiles, config: Any) -> None:
        """Pictures are made of whole tokens: PixtralProcessor's doing, not the file's."""
        files.require_tokens(*self.marks)
        side = config.vision_config.patch_size * self.merge(config)
        files.images.patch_size = {"height": side, "width": side}

    def model_inputs(
        self, rows: Sequence[VisionCalls], sizes: Sequence[Sequence[tuple[int, int]]]
    ) -> dict[str, np.ndarray]:
        """``pixel_values`` [P, channels, height, width], filled up with zeros, and ``image_sizes`` [P, 2]."""
        calls = [call for row in rows for call in row]
        patch = calls[0]["pixel_values"].shape[-1]
        pictures = [PatchRows(1, patch).whole(call) for call in calls]
        found = np.array([picture.shape[1:] for picture in pictures], np.int64)
        return {"pixel_values": filled(pictures), "image_sizes": found}


class Mistral3(Pixtral):
    """``Mistral3ForConditionalGeneration``: Mistral Small 3.1, Ministral 3."""

    title = "Mistral 3, Ministral 3"
    architecture = "Mistral3ForConditionalGeneration"
    text_models: tuple[str, ...] = ("mistral", "ministral3")
    tested_models: tuple[str, ...] = text_models
    aliases = {
        "mistral-small-3.1-24b": "mistralai/Mistral-Small-3.1-24B-Instruct-2503",
        **{f"ministral3-{size}b": f"mistralai/Ministral-3-{size}B-Instruct-2512-BF16" for size in (3, 8, 14)},
    }

    def check(self, config: Any) -> None:
        """Refuse projectors that merge nothing: no checkpoint has one, and its norm would be left out."""
        super().check(config)
        if config.spatial_merge_size < 2:
            raise ModelError(f"spatial_merge_size {config.spatial_merge_size} is not supported; 2 and more is")

    def merge(self, config: Any) -> int:
        """The projector merges patches."""
        return config.spatial_merge_size
