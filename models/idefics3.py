"""Idefics3, SmolVLM and SmolVLM2: a SigLIP tower, pixel shuffle, a Llama-like decoder."""

from __future__ import annotations

from collections.abc import Sequence
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import numpy as np

from vkvx.errors import ModelError
from vkvx.manifest import TensorSpec
from vkvx.models.family import Family, VisionCalls, check_image_size, square_pixels
from vkvx.models.pictures.tiles import TileGrid
from vkvx.models.processor_files import ProcessorFiles

if TYPE_CHECKING:
    from torch import Tensor, nn


class Idefics3(Family):
    """``Idefics3ForConditionalGeneration``: rows and columns of tiles, and the whole picture as one more."""

    title = "Idefics3, SmolVLM"
    aliases = {"idefics3": "HuggingFaceM4/Idefics3-8B-Llama3"}
    architecture = "Idefics3ForConditionalGeneration"
    text_models = ("llama", "mistral", "qwen2")
    tested_models = ("llama",)

    def check(self, config: Any) -> None:
        """Refuse patches that pixel shuffle cannot merge."""
        vision = config.vision_config
        super().check(config)
        if (vision.image_size // vision.patch_size) % config.scale_factor:
            raise ModelError(
                f"tiles of {vision.image_size} pixels in patches of {vision.patch_size}, merged by "
                f"{config.scale_factor}, are not supported"
            )

    def pictures(self, config: Any) -> TileGrid:
        """The marks that the processors of these models write."""
        side = config.vision_config.image_size // config.vision_config.patch_size // config.scale_factor
        return TileGrid(side**2, "<fake_token_around_image>", "<row_{row}_col_{column}>", "<global-img>")

    def typical_tokens(self, config: Any) -> tuple[int, ...]:
        """A photograph (3 rows of 4 tiles) and a square (4 of 4), with the whole picture."""
        return tuple(tiles * self.pictures(config).tile_tokens for tiles in (13, 17))

    def pixel_inputs(self, config: Any) -> tuple[TensorSpec, ...]:
        """``pixel_values`` of P tiles."""
        return square_pixels(config.vision_config, config.vision_config.image_size)

    def text_model(self, model: Any) -> nn.Module:
        """The decoder has another name here."""
        return model.model.text_model

    def vision_constants(self, model: Any) -> dict[str, Tensor]:
        """``position_ids`` [1, patches] of a whole tile, by the tower's own arithmetic, which rounds."""
        import torch

        vision = model.config.vision_config
        embeddings = type(model.model.vision_model.embeddings)
        side = vision.image_size // vision.patch_size
        ids: list[Tensor] = []

        def keep(position_ids: Tensor) -> float:
            ids.append(position_ids)
            return 0.0

        stand_in = SimpleNamespace(
            patch_embedding=lambda pixels: torch.zeros(1, 1, side, side),
            patch_size=vision.patch_size,
            num_patches_per_side=side,
            position_embedding=keep,
        )
        size = (1, vision.num_channels, vision.image_size, vision.image_size)
        embeddings.forward(stand_in, torch.zeros(size), torch.ones(1, side, side, dtype=torch.bool))
        return {"position_ids": ids[0]}

    def image_embeds(self, model: Any, *pixel_inputs: Tensor, **constants: Tensor) -> Tensor:
        """Tower and connector for whole tiles: ``get_image_features`` looks for padding, which cannot be traced."""
        tower = model.model.vision_model
        hidden = tower.embeddings.patch_embedding(pixel_inputs[0]).flatten(2).transpose(1, 2)
        hidden = hidden + tower.embeddings.position_embedding(constants["position_ids"])
        hidden = tower.encoder(inputs_embeds=hidden, attention_mask=None).last_hidden_state
        return model.model.connector(tower.post_layernorm(hidden)).flatten(0, 1)

    def prepare_processor(self, files: ProcessorFiles, config: Any) -> None:
        """The tower takes tiles of one size."""
        check_image_size(files.images.max_image_size, config.vision_config.image_size, files.image_file)
        files.require_tokens("<fake_token_around_image>")

    def model_inputs(
        self, rows: Sequence[VisionCalls], sizes: Sequence[Sequence[tuple[int, int]]]
    ) -> dict[str, np.ndarray]:
        """``pixel_values`` [B, tiles, ...]: rows with fewer tiles are filled up with zeros, which the model drops."""
        tiles = [[tile for call in row for tile in call["pixel_values"]] for row in rows]
        (shape,) = {tile.shape for row in tiles for tile in row}
        filled = np.zeros((len(tiles), max(map(len, tiles)), *shape), np.float32)
        for row, given in zip(filled, tiles, strict=True):
            for place, tile in zip(row, given, strict=False):
                place[...] = tile
        return {"pixel_values": filled}


class SmolVLM(Idefics3):
    """``SmolVLMForConditionalGeneration``: SmolVLM2."""

    title = "SmolVLM2"
    aliases = {
        "smolvlm2": "HuggingFaceTB/SmolVLM2-2.2B-Instruct",
        **{f"smolvlm2-{size}m": f"HuggingFaceTB/SmolVLM2-{size}M-Video-Instruct" for size in (256, 500)},
    }
    architecture = "SmolVLMForConditionalGeneration"
