"""LLaVA-1.5 and what is built like it: a CLIP or SigLIP tower, a projector of two layers, a Llama-like decoder."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from vkvx.errors import ModelError
from vkvx.format import WORD_BITS
from vkvx.manifest import ModelInfo, TensorSpec
from vkvx.models.family import Adapter, AttentionWeights

if TYPE_CHECKING:
    from torch import Tensor, nn

TEXT_MODELS = ("llama", "mistral", "qwen2")
CLASS_TOKENS = {"clip_vision_model": 1, "siglip_vision_model": 0}
"""Vision towers, and how many tokens each puts before those of the patches."""
STATIC_ROPE = ("default", "linear", "llama3", "yarn")
"""Rotary embeddings that depend on nothing but the position."""


class LlavaAdapter(Adapter):
    """``LlavaForConditionalGeneration``: every picture has the same size and so the same number of tokens."""

    architecture = "LlavaForConditionalGeneration"

    def check(self, config: Any) -> None:
        """Refuse other towers and decoders, sliding windows, and head dimensions that do not fill words."""
        text, vision = config.text_config, config.vision_config
        if getattr(config, "quantization_config", None):
            raise ModelError("the checkpoint's weights are quantised; give the original 16-bit or 32-bit checkpoint")
        if text.model_type not in TEXT_MODELS:
            raise ModelError(f"a LLaVA with a '{text.model_type}' decoder is not supported; {_one_of(TEXT_MODELS)} is")
        if vision.model_type not in CLASS_TOKENS:
            raise ModelError(f"a LLaVA with a '{vision.model_type}' tower is not supported; {_one_of(CLASS_TOKENS)} is")
        if getattr(text, "use_sliding_window", True) and getattr(text, "sliding_window", None) is not None:
            raise ModelError(
                f"the decoder attends over a sliding window of {text.sliding_window} tokens, which is not supported; "
                "a checkpoint whose config.json has no sliding_window is"
            )
        rope = (getattr(text, "rope_parameters", None) or {}).get("rope_type", "default")
        if rope not in STATIC_ROPE:
            raise ModelError(f"rotary embeddings of type '{rope}' are not supported; {_one_of(STATIC_ROPE)} is")
        if _head_dim(text) % WORD_BITS:
            raise ModelError(f"the head dim is {_head_dim(text)}; the packed cache needs a multiple of {WORD_BITS}")
        if not 0 <= config.image_token_id < text.vocab_size:
            raise ModelError(
                f"the image token {config.image_token_id} is not among the decoder's {text.vocab_size} tokens; "
                "fix image_token_index and the size of the embeddings"
            )
        if vision.image_size % vision.patch_size:
            raise ModelError(f"pictures of {vision.image_size} pixels are not made of patches of {vision.patch_size}")

    def info(self, config: Any, dtype: str, generation: Mapping[str, Any] | None = None) -> ModelInfo:
        """Facts from config.json and generation_config.json."""
        text = config.text_config
        eos, pad = (
            _first((generation or {}).get(name), getattr(config, name, None), getattr(text, name, None))
            for name in ("eos_token_id", "pad_token_id")
        )
        eos_ids = () if eos is None else (eos,) if isinstance(eos, int) else tuple(eos)
        return ModelInfo(
            name=str(config.name_or_path),
            source=str(config.name_or_path),
            revision=None,
            architecture=self.architecture,
            dtype=dtype,
            layers=text.num_hidden_layers,
            query_heads=text.num_attention_heads,
            kv_heads=text.num_key_value_heads,
            head_dim=_head_dim(text),
            hidden_size=text.hidden_size,
            vocab_size=text.vocab_size,
            max_positions=text.max_position_embeddings,
            image_token_id=config.image_token_id,
            tokens_per_picture=self.tokens_per_picture(config),
            eos_token_ids=eos_ids,
            pad_token_id=_first(pad, *eos_ids, 0),
        )

    def tokens_per_picture(self, config: Any) -> int:
        """Patches of a picture, with the class token and less the first token as the config says (576 in LLaVA-1.5)."""
        vision = config.vision_config
        tokens = (vision.image_size // vision.patch_size) ** 2 + CLASS_TOKENS[vision.model_type]
        return tokens - (config.vision_feature_select_strategy == "default")

    def pixel_inputs(self, config: Any) -> tuple[TensorSpec, ...]:
        """``pixel_values`` [P, channels, height, width] for P pictures."""
        vision = config.vision_config
        return (
            TensorSpec("pixel_values", "float32", ("P", vision.num_channels, vision.image_size, vision.image_size)),
        )

    def text_model(self, model: Any) -> nn.Module:
        """The Llama-like decoder."""
        return model.model.language_model

    def attention_weights(self, model: Any, layer: int) -> AttentionWeights:
        """Llama, Mistral and Qwen2 name them alike."""
        layers: Any = self.text_model(model).layers
        block = layers[layer]
        attention = block.self_attn
        return AttentionWeights(
            attention.q_proj.weight, attention.q_proj.bias, block.input_layernorm.weight, attention.o_proj.weight
        )

    def rotary_embedding(self, model: Any) -> nn.Module:
        """One for all layers."""
        return self.text_model(model).rotary_emb  # type: ignore[return-value]

    def image_embeds(self, model: Any, *pixel_inputs: Tensor) -> Tensor:
        """Tower, choice of features, projector: as ``get_image_features``, which cannot be traced for any P."""
        import torch

        config = model.config
        states = model.model.vision_tower(pixel_inputs[0], output_hidden_states=True).hidden_states
        layers = config.vision_feature_layer
        chosen = [states[layer] for layer in ([layers] if isinstance(layers, int) else layers)]
        if config.vision_feature_select_strategy == "default":
            chosen = [state[:, 1:] for state in chosen]
        return model.model.multi_modal_projector(torch.cat(chosen, dim=-1)).flatten(0, 1)

    def check_processor(self, processor: Any, config: Any) -> None:
        """Old checkpoints leave out how many placeholder tokens a picture takes: take it from the model's config."""
        vision = config.vision_config
        processor.patch_size = vision.patch_size
        processor.vision_feature_select_strategy = config.vision_feature_select_strategy
        processor.num_additional_image_tokens = CLASS_TOKENS[vision.model_type]
        images = processor.image_processor
        size = images.crop_size if getattr(images, "do_center_crop", False) else images.size
        given = {size.get("height", size.get("shortest_edge")), size.get("width", size.get("shortest_edge"))}
        if given != {vision.image_size}:
            raise ModelError(
                f"the image processor gives pictures of {sorted(given)} pixels, the vision tower takes "
                f"{vision.image_size}; fix preprocessor_config.json"
            )
        token = processor.tokenizer.convert_tokens_to_ids(processor.image_token)
        if token != config.image_token_id:
            raise ModelError(
                f"the tokenizer's '{processor.image_token}' is token {token}, config.json says "
                f"{config.image_token_id}; fix image_token_index"
            )


def _head_dim(text: Any) -> int:
    return getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads


def _one_of(names: Any) -> str:
    *rest, last = names
    return f"{', '.join(rest)} or {last}"


def _first(*candidates: Any) -> Any:
    return next((candidate for candidate in candidates if candidate is not None), None)
