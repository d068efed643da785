"""LLaVA-NeXT: LLaVA with pictures of any resolution, cut into tiles whose padding is dropped."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from vkvx.errors import ModelError
from vkvx.manifest import TensorSpec
from vkvx.models.family import Family, VisionCalls, check_image_size, filled, one_of, square_pixels
from vkvx.models.llava import CLASS_TOKENS, projected_features
from vkvx.models.pictures.anyres import AnyRes
from vkvx.models.processor_files import ProcessorFiles
from vkvx.models.qwen_vl import USUAL_SIZES

if TYPE_CHECKING:
    from torch import Tensor


class LlavaNext(Family):
    """``LlavaNextForConditionalGeneration``: LLaVA-1.6."""

    title = "LLaVA-NeXT, Granite Vision"
    architecture = "LlavaNextForConditionalGeneration"
    text_models: tuple[str, ...] = ("llama", "mistral", "qwen2", "granite")
    tested_models: tuple[str, ...] = ("llama", "mistral", "granite")
    aliases = {
        **{f"llava-next-vicuna-{size}b": f"llava-hf/llava-v1.6-vicuna-{size}b-hf" for size in (7, 13)},
        "llava-next-mistral-7b": "llava-hf/llava-v1.6-mistral-7b-hf",
        "llava-next-llama3-8b": "llava-hf/llama3-llava-next-8b-hf",
        "granite-vision-3.3-2b": "ibm-granite/granite-vision-3.3-2b",
    }

    def check(self, config: Any) -> None:
        """Refuse towers and choices of features that leave no square of tokens, and grids of parts of tiles."""
        vision = config.vision_config
        super().check(config)
        if vision.model_type not in CLASS_TOKENS:
            raise ModelError(
                f"a {self.title} with a '{vision.model_type}' tower is not supported; {one_of(CLASS_TOKENS)} is"
            )
        expected = "default" if CLASS_TOKENS[vision.model_type] else "full"
        if config.vision_feature_select_strategy != expected:
            raise ModelError(
                f"vision_feature_select_strategy '{config.vision_feature_select_strategy}' does not suit a "
                f"'{vision.model_type}' tower, whose patches alone can be put into rows; '{expected}' does"
            )
        for size in config.image_grid_pinpoints:
            if any(side < 1 or side % vision.image_size for side in size):
                raise ModelError(
                    f"image_grid_pinpoints has {list(size)}, which is not made of tiles of {vision.image_size} pixels; "
                    "fix config.json"
                )

    def pictures(self, config: Any) -> AnyRes:
        """Grids in the order of the config: of those that suit a picture equally the first is taken."""
        vision = config.vision_config
        grids = ((high // vision.image_size, wide // vision.image_size) for high, wide in config.image_grid_pinpoints)
        named = " ".join(f"{rows}x{columns}" for rows, columns in grids)
        return AnyRes(vision.image_size // vision.patch_size, vision.image_size, named, self.most_tiles(config))

    def most_tiles(self, config: Any) -> int:
        """Tiles that the features of larger grids are scaled down to; 0: they are not."""
        return 0

    def typical_tokens(self, config: Any) -> tuple[int, ...]:
        """Of pictures of ``USUAL_SIZES``."""
        pictures = self.pictures(config)
        return tuple(sorted({pictures.tokens(*size) for size in USUAL_SIZES}))

    def pixel_inputs(self, config: Any) -> tuple[TensorSpec, ...]:
        """``pixel_values`` of P tiles, and how :class:`AnyRes` packs their features."""
        return (*square_pixels(config.vision_config, config.vision_config.image_size), *self.pictures(config).inputs())

    def image_embeds(self, model: Any, *pixel_inputs: Tensor, **constants: Tensor) -> Tensor:
        """Tower, projector, and the packing as a choice of rows, the mark behind a row being the last."""
        import torch

        from vkvx.models.graph.vision import resampled

        pixels, index, *weight = pixel_inputs
        mark = model.model.image_newline.unsqueeze(0)
        table = torch.cat([projected_features(model, pixels).flatten(0, 1), mark])
        return resampled(table, index, weight[0]) if weight else table.index_select(0, index.squeeze(1))

    def prepare_processor(self, files: ProcessorFiles, config: Any) -> None:
        """Tiles and grids of the image processor must be those of the model."""
        images = files.images
        size = images.crop_size if getattr(images, "do_center_crop", False) else images.size
        check_image_size(size, config.vision_config.image_size, files.image_file)
        if [list(size) for size in images.image_grid_pinpoints] != [list(size) for size in config.image_grid_pinpoints]:
            raise ModelError(
                f"image_grid_pinpoints of the image processor and of the model differ; fix {files.image_file}"
            )

    def model_inputs(
        self, rows: Sequence[VisionCalls], sizes: Sequence[Sequence[tuple[int, int]]]
    ) -> dict[str, np.ndarray]:
        """``pixel_values`` [P, tiles, ...], filled up with zeros, and ``image_sizes`` [P, 2]."""
        pixels = filled([call["pixel_values"] for row in rows for call in row])
        return {"pixel_values": pixels, "image_sizes": np.array([size for row in sizes for size in row], np.int64)}
