"""GLM-4.1V, GLM-4.6V-Flash and GLM-OCR: patches that are merged by a convolution, rotary embeddings of neighbours."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from vkvx.models.pictures.grid import Grid
from vkvx.models.qwen_vl import GridFamily

if TYPE_CHECKING:
    from torch import Tensor


class Glm4V(GridFamily):
    """``Glm4vForConditionalGeneration``: the tower adds a learnt table of positions, resampled to the picture."""

    title = "GLM-4.1V"
    aliases = {"glm-4.1v-9b": "zai-org/GLM-4.1V-9B-Thinking"}
    architecture = "Glm4vForConditionalGeneration"
    text_models = tested_models = ("glm4v_text",)
    rotary_interleaved = True

    def pictures(self, config: Any) -> Grid:
        """The table is that of a square picture."""
        vision = config.vision_config
        return Grid(vision.spatial_merge_size, table=vision.image_size // vision.patch_size, kernel="bicubic")

    def image_embeds(self, model: Any, *pixel_inputs: Tensor, **constants: Tensor) -> Tensor:
        """As the tower does it, but for the table: taps are chosen outside, where it samples a grid by coordinates."""
        from vkvx.models.graph.vision import Whole, resampled

        pixels, positions, index, weight = pixel_inputs
        tower = model.model.visual
        hidden = tower.post_conv_layernorm(tower.patch_embed(pixels))
        turns = tower.rotary_pos_emb(hidden, positions)
        hidden = hidden + resampled(tower.embeddings.position_embedding.weight, index, weight)
        for block in tower.blocks:
            hidden = block(hidden, cu_seqlens=Whole(), max_seqlen=1, position_embeddings=turns)
        side = tower.spatial_merge_size
        hidden = tower.post_layernorm(hidden).unflatten(0, (-1, side, side)).permute(0, 3, 1, 2)
        return tower.merger(tower.downsample(hidden).flatten(1))


class Glm46V(Glm4V):
    """``Glm46VForConditionalGeneration``: GLM-4.6V-Flash."""

    title = "GLM-4.6V-Flash"
    aliases = {"glm-4.6v-flash": "zai-org/GLM-4.6V-Flash"}
    architecture = "Glm46VForConditionalGeneration"


class GlmOcr(GridFamily):
    """``GlmOcrForConditionalGeneration``: its tower has no table of positions."""

    title = "GLM-OCR"
    aliases = {"glm-ocr": "zai-org/GLM-OCR"}
    architecture = "GlmOcrForConditionalGeneration"
    text_models = tested_models = ("glm_ocr_text",)
    rotary_interleaved = True

    def image_embeds(self, model: Any, *pixel_inputs: Tensor, **constants: Tensor) -> Tensor:
        """The tower merges patches itself."""
        from vkvx.models.graph.vision import Whole

        pixels, positions = pixel_inputs
        return model.model.visual(pixels, None, cu_seqlens=Whole(), max_seqlen=1, position_ids=positions).pooler_output
