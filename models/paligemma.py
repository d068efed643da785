"""PaliGemma 1 and 2: a SigLIP tower, a linear projector, Gemma or Gemma 2; prompts see themselves as a whole."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from vkvx.errors import ModelError
from vkvx.manifest import LayerInfo, PromptInfo, TensorSpec
from vkvx.models.family import Family, check_image_size, softcapped, square_pixels
from vkvx.models.gemma3 import SLIDING
from vkvx.models.pictures.tiles import Tiles
from vkvx.models.processor_files import ProcessorFiles

if TYPE_CHECKING:
    from torch import Tensor


class PaliGemma(Family):
    """``PaliGemmaForConditionalGeneration``: pictures, then the prompt; every token of these sees all others.

    A later prompt in a sequence sees what is cached, and itself as a whole; what is cached does not see it. So a second
    turn is not what transformers makes of both turns in one prompt, whose first turn sees the second.
    """

    title = "PaliGemma 1, 2"
    architecture = "PaliGemmaForConditionalGeneration"
    text_models = tested_models = ("gemma", "gemma2")
    aliases = {
        "paligemma-3b": "google/paligemma-3b-mix-224",
        **{f"paligemma2-{size}b": f"google/paligemma2-{size}b-mix-224" for size in (3, 10, 28)},
    }
    prompt = PromptInfo(begin="<bos>", end="\n")
    first_position = 1
    norm_shift = 1.0

    def check(self, config: Any) -> None:
        """Refuse other towers, and prompts that do not see later text."""
        vision = config.vision_config
        super().check(config)
        if vision.model_type != "siglip_vision_model":
            raise ModelError(f"a PaliGemma with a '{vision.model_type}' tower is not supported; siglip_vision_model is")
        if not config.text_config.use_bidirectional_attention:
            raise ModelError(
                "use_bidirectional_attention is false: prompts whose tokens see earlier ones only are not supported"
            )

    def layers(self, config: Any) -> tuple[LayerInfo, ...]:
        """Gemma 2 bounds its scores and has windows in every other layer."""
        text = config.text_config
        return tuple(
            LayerInfo(
                kv_heads=text.num_key_value_heads,
                head_dim=text.head_dim,
                scale=getattr(text, "query_pre_attn_scalar", text.head_dim) ** -0.5,
                sliding_window=text.sliding_window if kind == SLIDING else 0,
                visual_mask="prefix",
                softcap=float(getattr(text, "attn_logit_softcapping", None) or 0),
            )
            for kind in getattr(text, "layer_types", None) or [""] * text.num_hidden_layers
        )

    def pictures(self, config: Any) -> Tiles:
        """A picture is a tile, and nothing stands around it."""
        return Tiles(self.tokens_per_picture(config))

    def tokens_per_picture(self, config: Any) -> int:
        """Patches of a picture: 256 of 224 x 224 pixels."""
        return int(config.text_config.num_image_tokens)

    def typical_tokens(self, config: Any) -> tuple[int, ...]:
        """Those of every picture."""
        return (self.tokens_per_picture(config),)

    def pixel_inputs(self, config: Any) -> tuple[TensorSpec, ...]:
        """``pixel_values`` of P pictures."""
        return square_pixels(config.vision_config, config.vision_config.image_size)

    def image_embeds(self, model: Any, *pixel_inputs: Tensor, **constants: Tensor) -> Tensor:
        """Tower and projector."""
        return model.get_image_features(pixel_inputs[0]).pooler_output.flatten(0, 1)

    def logits(self, config: Any, logits: Tensor) -> Tensor:
        """Gemma 2 bounds its logits."""
        return softcapped(logits, getattr(config.text_config, "final_logit_softcapping", None))

    def prepare_processor(self, files: ProcessorFiles, config: Any) -> None:
        """The tower takes pictures of one size."""
        check_image_size(files.images.size, config.vision_config.image_size, files.image_file)
        files.require_tokens(self.prompt.begin)
