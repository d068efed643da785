"""InternVL 2.5, 3 and 3.5 in transformers' own format (repositories that end in ``-hf``)."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from vkvx.errors import ModelError
from vkvx.manifest import TensorSpec
from vkvx.models.family import Family, check_image_size, square_pixels
from vkvx.models.pictures.tiles import Tiles
from vkvx.models.processor_files import ProcessorFiles

if TYPE_CHECKING:
    from torch import Tensor


TINY_INTERN = Path(__file__).resolve().parent / "tiny_intern"
"""A checkpoint that comes with the package."""


class InternVL(Family):
    """``InternVLForConditionalGeneration``: up to 12 tiles a picture and a thumbnail, 256 tokens each."""

    title = "InternVL 2.5, 3, 3.5"
    architecture = "InternVLForConditionalGeneration"
    text_models = ("llama", "qwen2", "qwen3")
    tested_models = ("qwen2", "qwen3")
    aliases = {
        "tiny-intern": TINY_INTERN,
        **{f"internvl3-{size}b": f"OpenGVLab/InternVL3-{size}B-hf" for size in (1, 2, 8, 14, 38)},
        **{f"internvl3.5-{size}b": f"OpenGVLab/InternVL3_5-{size}B-HF" for size in (1, 2, 4, 8)},
    }

    def check(self, config: Any) -> None:
        """Refuse towers whose tiles are not square, and patches that pixel shuffle cannot merge."""
        vision = config.vision_config
        super().check(config)
        merged = vision.image_size[0] // vision.patch_size[0] * config.downsample_ratio
        if vision.image_size[0] != vision.image_size[1] or merged != int(merged):
            raise ModelError(
                f"tiles of {vision.image_size} pixels in patches of {vision.patch_size}, scaled by "
                f"{config.downsample_ratio}, are not supported; square ones with a whole number of patches are"
            )

    def pictures(self, config: Any) -> Tiles:
        """Tiles of as many tokens as pixel shuffle leaves, between ``<img>`` and ``</img>``."""
        vision = config.vision_config
        side = vision.image_size[0] // vision.patch_size[0]
        return Tiles(int((side * config.downsample_ratio) ** 2), "<img>", "</img>")

    def typical_tokens(self, config: Any) -> tuple[int, ...]:
        """A banner, a square and a photograph of some megapixels: 7, 10 and 13 tiles."""
        return tuple(tiles * self.pictures(config).tile_tokens for tiles in (7, 10, 13))

    def pixel_inputs(self, config: Any) -> tuple[TensorSpec, ...]:
        """``pixel_values`` of P tiles."""
        return square_pixels(config.vision_config, config.vision_config.image_size[0])

    def image_embeds(self, model: Any, *pixel_inputs: Tensor, **constants: Tensor) -> Tensor:
        """Tower, pixel shuffle, projector."""
        return model.get_image_features(pixel_inputs[0]).pooler_output.flatten(0, 1)

    def prepare_processor(self, files: ProcessorFiles, config: Any) -> None:
        """Pictures are cut into tiles unless somebody asks otherwise: InternVLProcessor's default, not the file's."""
        check_image_size(files.images.size, config.vision_config.image_size[0], files.image_file)
        files.require_tokens("<img>", "</img>")
        files.images.crop_to_patches = True
