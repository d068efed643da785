"""PaddleOCR-VL: patches row by row, which the projector merges; an ERNIE decoder."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from vkvx.models.pictures.grid import Grid
from vkvx.models.qwen_vl import GridFamily

if TYPE_CHECKING:
    from torch import Tensor


class PaddleOcrVL(GridFamily):
    """``PaddleOCRVLForConditionalGeneration``."""

    title = "PaddleOCR-VL"
    aliases = {"paddleocr-vl": "PaddlePaddle/PaddleOCR-VL"}
    architecture = "PaddleOCRVLForConditionalGeneration"
    text_models = tested_models = ("paddleocr_vl_text",)

    def pictures(self, config: Any) -> Grid:
        """The tower resamples the positions of a square picture."""
        vision = config.vision_config
        side = vision.image_size // vision.patch_size
        return Grid(vision.spatial_merge_size, table=side, kernel="bilinear", raster=1)

    def patch_shape(self, vision: Any) -> tuple[int, ...]:
        """A patch is a small picture."""
        return (vision.num_channels, vision.patch_size, vision.patch_size)

    def image_embeds(self, model: Any, *pixel_inputs: Tensor, **constants: Tensor) -> Tensor:
        """The tower, and the projector with its patches chosen by an index."""
        from vkvx.models.graph.vision import Whole

        pixels, positions, index, weight, merge_index = pixel_inputs
        hidden = model.model.visual(
            pixel_values=pixels.unsqueeze(0),
            cu_seqlens=Whole(),
            max_seqlen=1,
            position_ids=positions,
            interp_indices=index,
            interp_weights=weight,
        ).last_hidden_state
        projector = model.model.projector
        merged = projector.pre_norm(hidden).index_select(0, merge_index.flatten())
        merged = merged.reshape(-1, merge_index.shape[1] * hidden.shape[-1])
        return projector.linear_2(projector.act(projector.linear_1(merged)))
