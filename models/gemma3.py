"""Gemma 3: a SigLIP tower, 256 tokens a picture; most layers see a window, and pictures see themselves as a whole."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from vkvx.errors import ModelError
from vkvx.manifest import LayerInfo, PromptInfo, TensorSpec
from vkvx.models.family import Family, check_image_size, square_pixels
from vkvx.models.pictures.tiles import Tiles
from vkvx.models.processor_files import ProcessorFiles

if TYPE_CHECKING:
    from torch import Tensor

SLIDING = "sliding_attention"
"""Type of the layers that see a window."""
BEGIN, END = "<start_of_image>", "<end_of_image>"


class Gemma3(Family):
    """``Gemma3ForConditionalGeneration``: every picture is resized to one square and has one number of tokens."""

    title = "Gemma 3"
    architecture = "Gemma3ForConditionalGeneration"
    text_models = tested_models = ("gemma3_text",)
    aliases = {f"gemma3-{size}b": f"google/gemma-3-{size}b-it" for size in (4, 12, 27)}
    prompt = PromptInfo(picture=BEGIN)
    norm_shift = 1.0

    def check(self, config: Any) -> None:
        """Refuse decoders that see later text, and patches that cannot be pooled evenly."""
        text, vision = config.text_config, config.vision_config
        super().check(config)
        if text.use_bidirectional_attention:
            raise ModelError("a decoder whose text sees later text (use_bidirectional_attention) is not supported")
        side, tokens = vision.image_size // vision.patch_size, int(config.mm_tokens_per_image**0.5)
        if vision.model_type != "siglip_vision_model" or tokens**2 != config.mm_tokens_per_image or side % tokens:
            raise ModelError(
                f"pictures of {side} x {side} patches of a '{vision.model_type}' tower, pooled to "
                f"{config.mm_tokens_per_image} tokens, are not supported; those of a SigLIP tower, pooled evenly, are"
            )

    def layers(self, config: Any) -> tuple[LayerInfo, ...]:
        """Windows in the sliding layers; the tokens of a picture see each other in all layers."""
        text = config.text_config
        return tuple(
            LayerInfo(
                kv_heads=text.num_key_value_heads,
                head_dim=text.head_dim,
                scale=text.query_pre_attn_scalar**-0.5,
                sliding_window=text.sliding_window if kind == SLIDING else 0,
                visual_mask="run",
            )
            for kind in text.layer_types
        )

    def rotary_options(self, config: Any, layer: int) -> dict[str, Any]:
        """Sliding and full layers have rotary embeddings of their own."""
        return {"layer_type": config.text_config.layer_types[layer]}

    def pictures(self, config: Any) -> Tiles:
        """A picture is a tile between marks, with empty lines around them."""
        return Tiles(config.mm_tokens_per_image, f"\n\n{BEGIN}", f"{END}\n\n")

    def tokens_per_picture(self, config: Any) -> int:
        """What pooling leaves of the patches."""
        return int(config.mm_tokens_per_image)

    def typical_tokens(self, config: Any) -> tuple[int, ...]:
        """Those of every picture."""
        return (self.tokens_per_picture(config),)

    def pixel_inputs(self, config: Any) -> tuple[TensorSpec, ...]:
        """``pixel_values`` of P pictures."""
        return square_pixels(config.vision_config, config.vision_config.image_size)

    def image_embeds(self, model: Any, *pixel_inputs: Tensor, **constants: Tensor) -> Tensor:
        """Tower, pooling, projector."""
        return model.get_image_features(pixel_inputs[0]).pooler_output.flatten(0, 1)

    def prepare_processor(self, files: ProcessorFiles, config: Any) -> None:
        """Pictures are not cut: crops would need a text of their own around them."""
        check_image_size(files.images.size, config.vision_config.image_size, files.image_file)
        files.require_tokens(BEGIN, END)
        if files.images.do_pan_and_scan:
            raise ModelError(f"pan and scan is not supported; set do_pan_and_scan to false in {files.image_file}")
