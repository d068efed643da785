"""Qwen3-VL, and what has its architecture (Cosmos-Reason2): the decoder takes features of several tower layers."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from vkvx.models.pictures.grid import Grid
from vkvx.models.qwen_vl import VIDEO_MARK, GridFamily

if TYPE_CHECKING:
    from torch import Tensor


TINY_QWEN = Path(__file__).resolve().parent / "tiny_qwen"
"""A checkpoint that comes with the package."""


class Qwen3VL(GridFamily):
    """``Qwen3VLForConditionalGeneration``: behind an embedding stands what the first decoder layers add (deepstack)."""

    title = "Qwen3-VL"
    aliases = {
        "tiny-qwen": TINY_QWEN,
        **{f"qwen3-vl-{size}b": f"Qwen/Qwen3-VL-{size}B-Instruct" for size in (2, 4, 8, 32)},
    }
    architecture = "Qwen3VLForConditionalGeneration"
    text_models = tested_models = ("qwen3_vl_text",)

    def pictures(self, config: Any) -> Grid:
        """The corners of the learnt table are those of the picture. Before each frame of a video stands its time."""
        vision = config.vision_config
        side = int(vision.num_position_embeddings**0.5)
        return Grid(
            vision.spatial_merge_size,
            table=side,
            kernel="bilinear",
            corners=1,
            video_mark=VIDEO_MARK,
            frame_start="<|vision_start|>",
            frame_end="<|vision_end|>",
        )

    def deepstack(self, config: Any) -> int:
        """As many layers of the tower as its config names."""
        return len(config.vision_config.deepstack_visual_indexes)

    def image_embeds(self, model: Any, *pixel_inputs: Tensor, **constants: Tensor) -> Tensor:
        """Embeddings and features beside each other: [tokens, hidden * (1 + deepstack)]."""
        import torch

        output = self.tower(model, *pixel_inputs)
        return torch.cat([output.pooler_output, *output.deepstack_features], dim=-1)

    def tower(self, model: Any, *pixel_inputs: Tensor) -> Any:
        """What the tower makes of a picture, as transformers' module gives it."""
        from vkvx.models.graph.vision import Whole

        pixels, positions, index, weight = pixel_inputs
        return model.model.visual(
            pixels,
            None,
            cu_seqlens=Whole(),
            max_seqlen=1,
            position_ids=positions,
            interp_indices=index,
            interp_weights=weight,
        )
