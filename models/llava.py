"""LLaVA-1.5 and what is built like it: a CLIP or SigLIP tower, a projector of two layers, a Llama-like decoder."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from vkvx.errors import ModelError
from vkvx.manifest import TensorSpec
from vkvx.models.family import Family, check_image_size, one_of, square_pixels
from vkvx.models.pictures.tiles import Tiles
from vkvx.models.pixtral import Pixtral
from vkvx.models.processor_files import ProcessorFiles

if TYPE_CHECKING:
    from torch import Tensor

TINY_LLAVA = Path(__file__).resolve().parent / "tiny_llava"
"""The checkpoint that comes with the package."""
CLASS_TOKENS = {"clip_vision_model": 1, "siglip_vision_model": 0}
"""Vision towers, and how many tokens each puts before those of the patches."""


class Llava(Family):
    """``LlavaForConditionalGeneration``: every picture has the same size and so the same number of tokens."""

    title = "LLaVA-1.5, Pixtral"
    architecture = "LlavaForConditionalGeneration"
    text_models = tested_models = ("llama", "mistral", "qwen2", "qwen3")
    aliases = {
        "tiny-llava": TINY_LLAVA,
        "llava": "llava-hf/llava-1.5-7b-hf",
        "llava-13b": "llava-hf/llava-1.5-13b-hf",
        "pixtral-12b": "mistral-community/pixtral-12b",
    }

    def variant(self, config: Any) -> Family:
        """Pixtral, which has the same architecture, is told by its tower."""
        return Pixtral() if config.vision_config.model_type == "pixtral" else self

    def check(self, config: Any) -> None:
        """Refuse other towers and decoders."""
        vision = config.vision_config
        super().check(config)
        if vision.model_type not in CLASS_TOKENS:
            raise ModelError(
                f"a LLaVA with a '{vision.model_type}' tower is not supported; {one_of((*CLASS_TOKENS, 'pixtral'))} is"
            )

    def pictures(self, config: Any) -> Tiles:
        """A picture is a tile, and nothing stands around it."""
        return Tiles(self.tokens_per_picture(config))

    def tokens_per_picture(self, config: Any) -> int:
        """Patches of a picture, with the class token and less the first token as the config says (576 in LLaVA-1.5)."""
        vision = config.vision_config
        tokens = (vision.image_size // vision.patch_size) ** 2 + CLASS_TOKENS[vision.model_type]
        return tokens - (config.vision_feature_select_strategy == "default")

    def typical_tokens(self, config: Any) -> tuple[int, ...]:
        """Those of every picture."""
        return (self.tokens_per_picture(config),)

    def pixel_inputs(self, config: Any) -> tuple[TensorSpec, ...]:
        """``pixel_values`` of P pictures."""
        return square_pixels(config.vision_config, config.vision_config.image_size)

    def image_embeds(self, model: Any, *pixel_inputs: Tensor, **constants: Tensor) -> Tensor:
        """Tower, choice of features, projector: as ``get_image_features``, which cannot be traced for any P."""
        return projected_features(model, pixel_inputs[0]).flatten(0, 1)

    def prepare_processor(self, files: ProcessorFiles, config: Any) -> None:
        """The tower takes pictures of one size."""
        images = files.images
        size = images.crop_size if getattr(images, "do_center_crop", False) else images.size
        check_image_size(size, config.vision_config.image_size, files.image_file)


def projected_features(model: Any, pixels: Tensor) -> Tensor:
    """Features [P, tokens, hidden] that the projector makes of the layers that the config names."""
    import torch

    config = model.config
    states = model.model.vision_tower(pixels, output_hidden_states=True).hidden_states
    layers = config.vision_feature_layer
    chosen = [states[layer] for layer in ([layers] if isinstance(layers, int) else layers)]
    if config.vision_feature_select_strategy == "default":
        chosen = [state[:, 1:] for state in chosen]
    return model.model.multi_modal_projector(torch.cat(chosen, dim=-1))
