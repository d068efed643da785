"""Gemma 4: pictures of any shape; layers with windows and without, with heads of their own; some of shared keys."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from vkvx.errors import ModelError
from vkvx.manifest import LayerInfo, TensorSpec
from vkvx.models.family import Family, VisionCalls, filled, softcapped
from vkvx.models.gemma3 import SLIDING, Gemma3
from vkvx.models.pictures.pooled import PooledPatches
from vkvx.models.processor_files import ProcessorFiles

if TYPE_CHECKING:
    from torch import Tensor, nn

BEGIN, END = "<|image>", "<image|>"


class Gemma4(Family):
    """``Gemma4ForConditionalGeneration`` without experts. Sound is not taken: graphs leave its tower out."""

    title = "Gemma 4"
    architecture = "Gemma4ForConditionalGeneration"
    text_models = tested_models = ("gemma4_text",)
    aliases = {f"gemma4-{size}": f"google/gemma-4-{size.upper()}-it" for size in ("e2b", "e4b", "31b")}
    packed_vision = True
    rotary_options = Gemma3.rotary_options

    def check(self, config: Any) -> None:
        """Refuse experts, and decoders whose text sees later text."""
        text = config.text_config
        if text.enable_moe_block:
            raise ModelError("a Gemma 4 with experts (enable_moe_block) is not supported; a dense one such as 31B is")
        if text.use_bidirectional_attention == "all":
            raise ModelError("a decoder whose text sees later text (use_bidirectional_attention) is not supported")
        if config.vision_config is None:
            raise ModelError("the checkpoint has no vision tower (vision_config); give one that takes pictures")
        super().check(config)

    def layers(self, config: Any) -> tuple[LayerInfo, ...]:
        """Heads of two sizes; the last layers may read keys and values of the last one of their type before them."""
        text = config.text_config
        cached = text.num_hidden_layers - text.num_kv_shared_layers
        last = {kind: i for i, kind in enumerate(text.layer_types[:cached])}
        visual_mask = "run" if text.use_bidirectional_attention == "vision" else "causal"
        return tuple(
            LayerInfo(
                kv_heads=text.per_layer_config[i].num_key_value_heads,
                head_dim=text.per_layer_config[i].head_dim,
                scale=1.0,
                sliding_window=text.sliding_window if kind == SLIDING else 0,
                visual_mask=visual_mask if kind == SLIDING else "causal",
                keys_of=None if i < cached else last[kind],
            )
            for i, kind in enumerate(text.layer_types)
        )

    def pictures(self, config: Any) -> PooledPatches:
        """Patches averaged to tokens, between marks."""
        return PooledPatches(config.vision_config.pooling_kernel_size, BEGIN, END)

    def typical_tokens(self, config: Any) -> tuple[int, ...]:
        """A square, a wide screen and a photograph, of 280 tokens at most."""
        return (256, 264, 266)

    def pixel_inputs(self, config: Any) -> tuple[TensorSpec, ...]:
        """``pixel_values`` of patches, where they are, and which make a token."""
        pictures = self.pictures(config)
        shape = (pictures.pixel_rows, 3 * config.vision_config.patch_size**2)
        return (TensorSpec("pixel_values", "float32", shape), *pictures.inputs())

    def image_embeds(self, model: Any, *pixel_inputs: Tensor, **constants: Tensor) -> Tensor:
        """Tower, average and projector for patches without padding, which ``get_image_features`` looks for."""
        from vkvx.models.graph.vision import Whole

        pixels, positions, index = pixel_inputs
        tower, padding = model.model.vision_tower, positions[None, :, 0] < 0
        hidden = tower.patch_embedder(pixels[None], positions[None], padding)
        hidden = tower.encoder(
            inputs_embeds=hidden, attention_mask=None, pixel_position_ids=positions[None], cu_seq_lens_q=Whole()
        ).last_hidden_state[0]
        pooled = hidden.index_select(0, index.flatten()).unflatten(0, index.shape).float().mean(1).to(pixels.dtype)
        pooled = pooled.float() * tower.config.hidden_size**0.5
        if tower.config.standardize:
            pooled = (pooled - tower.std_bias.float()) * tower.std_scale.float()
        return model.model.embed_vision(pooled.to(pixels.dtype))

    def text_inputs(self, text_model: nn.Module, config: Any, input_ids: Tensor) -> dict[str, Tensor]:
        """Embeddings of the tokens for each layer, in models that have them; pictures have that of padding."""
        text = config.text_config
        if not text.hidden_size_per_layer_input:
            return {}
        for token in (config.image_token_id, config.video_token_id, config.audio_token_id):
            input_ids = input_ids.masked_fill(input_ids == token, text.pad_token_id)
        return {"per_layer_inputs": text_model.get_per_layer_inputs(input_ids)}  # type: ignore[operator]

    def logits(self, config: Any, logits: Tensor) -> Tensor:
        """Bounded logits."""
        return softcapped(logits, config.text_config.final_logit_softcapping)

    def prepare_processor(self, files: ProcessorFiles, config: Any) -> None:
        """Patches must be those that the tower takes."""
        files.require_tokens(BEGIN, END)
        given, vision = (files.images.patch_size, files.images.pooling_kernel_size), config.vision_config
        if given != (vision.patch_size, vision.pooling_kernel_size):
            raise ModelError(
                f"the image processor makes patches of {given[0]} pixels, pooled by {given[1]}; the tower takes "
                f"{vision.patch_size} and {vision.pooling_kernel_size}; fix {files.image_file}"
            )

    def model_inputs(
        self, rows: Sequence[VisionCalls], sizes: Sequence[Sequence[tuple[int, int]]]
    ) -> dict[str, np.ndarray]:
        """``pixel_values`` and ``image_position_ids`` [P, patches, ...], filled up to the picture with most patches."""
        calls = [call for row in rows for call in row]
        positions = filled([call["image_position_ids"] + 1 for call in calls]) - 1
        return {"pixel_values": filled([call["pixel_values"] for call in calls]), "image_position_ids": positions}
