"""Tiny LLaVAs that differ in what checkpoints differ in: decoders, heads, towers, features, vocabularies, ropes."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from vkvx.models.random_checkpoint import write_checkpoint

_TEXT = {"hidden_size": 96, "intermediate_size": 160, "num_hidden_layers": 2, "vocab_size": 512}
_TEXT |= {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "max_position_embeddings": 4096}
_VISION = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 2}


@dataclass(frozen=True)
class Variant:
    """A decoder with ``heads`` (query heads, KV heads, head dim), and a tower with ``pixels`` (picture, patch).

    ``generation`` are the contents of generation_config.json, ``quantizer`` is that of the packed bundle. ``often``
    marks those that every run of the tests goes through.
    """

    name: str
    decoder: str
    heads: tuple[int, int, int]
    tower: str
    pixels: tuple[int, int]
    tokens: int
    features: tuple[Any, str] = (-2, "default")
    text: dict[str, Any] = field(default_factory=dict)
    more: dict[str, Any] = field(default_factory=dict)
    generation: dict[str, Any] = field(default_factory=dict)
    quantizer: str = "shaped"
    often: bool = False

    def config(self) -> Any:
        """The config of transformers."""
        from transformers import CONFIG_MAPPING

        query_heads, kv_heads, head_dim = self.heads
        heads = {"num_attention_heads": query_heads, "num_key_value_heads": kv_heads, "head_dim": head_dim}
        size, patch = self.pixels
        vision = {**_VISION, "model_type": f"{self.tower}_vision_model", "image_size": size, "patch_size": patch}
        if self.tower == "siglip":
            vision["vision_use_head"] = False
        layer, strategy = self.features
        return CONFIG_MAPPING["llava"](
            text_config={**_TEXT, **heads, "model_type": self.decoder, **self.text},
            vision_config=vision,
            image_token_index=3,
            image_seq_length=self.tokens,
            vision_feature_layer=layer,
            vision_feature_select_strategy=strategy,
            architectures=["LlavaForConditionalGeneration"],
            tie_word_embeddings=self.text.get("tie_word_embeddings", False),
            **self.more,
        )


SHARP = 1.6
"""Queries and keys times this: attention then looks at single tokens, and greedy answers do not repeat themselves."""


def write_variant(directory: Path, variant: Variant) -> None:
    """A checkpoint of random FP32 weights whose answers have many different tokens."""
    from safetensors.numpy import load_file, save_file

    write_checkpoint(directory, variant.config(), dtype="float32", seed=1)
    path = directory / "model.safetensors"
    weights = load_file(path)
    for name, weight in weights.items():
        if "language_model" in name and name.endswith(("q_proj.weight", "k_proj.weight")):
            weights[name] = weight * SHARP
        elif name.endswith("q_norm.weight"):  # where norms undo the former
            weights[name] = weight * SHARP**2
    save_file(weights, path, {"format": "pt"})
    if variant.generation:
        (directory / "generation_config.json").write_text(json.dumps(variant.generation))


def _rope(kind: str, **parameters: Any) -> dict[str, Any]:
    return {"rope_parameters": {"rope_type": kind, "rope_theta": 10000.0, **parameters}}


_LLAMA3 = _rope("llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=32)
_LINEAR = _rope("linear", factor=3.0)
_YARN = _rope("yarn", factor=4.0, original_max_position_embeddings=32)
_YARN_PADDED = {**_YARN, "vocab_size": 1000}
_TIED = {"tie_word_embeddings": True}
_NO_BIAS = {"multimodal_projector_bias": False}
_RULES = {"repetition_penalty": 1.3, "no_repeat_ngram_size": 2, "suppress_tokens": [*range(60, 200)]}
_RULES |= {"begin_suppress_tokens": [*range(200, 300)], "bad_words_ids": [[7], [300, 301]]}
_SAMPLED = {**_RULES, "do_sample": True, "temperature": 0.01, "top_k": 1}
_FULL, _LAST = (-2, "full"), (-1, "full")

VARIANTS = (
    # decoders, grouped and single KV heads, head dims
    Variant("llama", "llama", (4, 2, 64), "clip", (56, 14), 16),
    Variant("llama-each", "llama", (3, 3, 64), "clip", (56, 14), 16, quantizer="minmax"),
    Variant("llama-single", "llama", (6, 1, 64), "clip", (56, 14), 16, quantizer="lloyd"),
    Variant("llama-96", "llama", (4, 2, 96), "clip", (61, 14), 16, quantizer="lloyd", often=True, text=_LLAMA3),
    Variant("llama-256", "llama", (2, 1, 256), "clip", (56, 14), 16),
    Variant("llama-32", "llama", (6, 3, 32), "clip", (56, 14), 16),
    Variant("llama-512", "llama", (2, 1, 512), "clip", (42, 14), 9),
    Variant("llama-biased", "llama", (4, 2, 64), "clip", (56, 14), 16, text={"attention_bias": True, "mlp_bias": True}),
    Variant("mistral", "mistral", (4, 2, 64), "clip", (56, 14), 16, text={"sliding_window": None}),
    Variant("mistral-window", "mistral", (4, 1, 96), "siglip", (45, 14), 9, _LAST, often=True),
    Variant("mistral-256", "mistral", (2, 2, 256), "clip", (56, 14), 16, quantizer="lloyd"),
    Variant("mistral-128", "mistral", (4, 2, 128), "siglip", (56, 14), 16, _LAST),
    Variant("qwen2", "qwen2", (4, 2, 64), "siglip", (56, 14), 16, _LAST),
    Variant("qwen2-single", "qwen2", (4, 1, 64), "siglip", (56, 14), 16, _LAST, quantizer="quantile"),
    Variant("qwen2-96", "qwen2", (3, 1, 96), "siglip", (58, 14), 16, _LAST, quantizer="lloyd"),
    Variant("qwen2-256", "qwen2", (2, 1, 256), "siglip", (38, 9), 16, _LAST),
    Variant("qwen3", "qwen3", (4, 2, 64), "clip", (56, 14), 16),
    Variant("qwen3-single", "qwen3", (4, 1, 64), "siglip", (50, 16), 9, _LAST),
    Variant("qwen3-96", "qwen3", (6, 2, 96), "clip", (56, 14), 16, quantizer="minmax"),
    Variant("qwen3-256", "qwen3", (2, 1, 256), "siglip", (45, 14), 9, _LAST, often=True, text=_TIED, more=_NO_BIAS),
    # towers: sizes that are no multiple of the patch, layers and choices of features, projectors
    Variant("clip-odd", "llama", (4, 2, 64), "clip", (61, 14), 16),
    Variant("clip-odd-full", "qwen2", (4, 2, 64), "clip", (47, 10), 17, _FULL),
    Variant("siglip-odd", "qwen2", (4, 2, 64), "siglip", (384 // 6 + 1, 14), 16, _LAST, quantizer="shrink"),
    Variant("siglip-odd-default", "llama", (4, 2, 64), "siglip", (57, 14), 15, (-1, "default")),
    Variant("siglip-odd-large", "qwen3", (4, 2, 64), "siglip", (110, 9), 144, _LAST),
    Variant(
        "layers",
        "llama",
        (4, 2, 64),
        "clip",
        (56, 14),
        16,
        ([-3, -1], "default"),
        often=True,
        text={**_LINEAR, **_TIED},
        generation=_RULES,
    ),
    Variant("layers-full", "mistral", (4, 2, 64), "clip", (56, 14), 17, ([0, 1, -1], "full"), more=_NO_BIAS),
    Variant("layers-siglip", "qwen2", (4, 1, 64), "siglip", (59, 14), 16, ([0, -1], "full"), quantizer="lloyd"),
    Variant("first-layer", "llama", (4, 4, 64), "clip", (56, 14), 16, (1, "default"), more=_NO_BIAS),
    Variant("no-bias", "qwen3", (4, 2, 64), "clip", (56, 14), 16, more={**_NO_BIAS, "projector_hidden_act": "relu"}),
    # vocabularies and heads; the tokenizer has 406 tokens
    Variant("vocabulary-exact", "llama", (4, 2, 64), "clip", (56, 14), 16, text={"vocab_size": 406}),
    Variant("vocabulary-odd", "qwen2", (4, 2, 64), "clip", (56, 14), 16, text={"vocab_size": 407, **_TIED}),
    Variant("vocabulary-padded", "mistral", (4, 2, 64), "clip", (56, 14), 16, text={"vocab_size": 1024}),
    Variant("tied", "llama", (4, 2, 64), "clip", (56, 14), 16, text=_TIED, generation=_SAMPLED),
    Variant("tied-padded", "qwen3", (4, 1, 96), "siglip", (57, 14), 16, _LAST, text={"vocab_size": 640, **_TIED}),
    # rotary embeddings
    Variant("rope-linear", "llama", (4, 2, 64), "clip", (56, 14), 16, text=_LINEAR),
    Variant("rope-llama3", "llama", (4, 2, 64), "clip", (56, 14), 16, text=_LLAMA3),
    Variant("rope-yarn", "qwen3", (4, 2, 64), "clip", (56, 14), 16, text=_YARN),
    Variant(
        "rope-yarn-padded",
        "qwen2",
        (4, 1, 64),
        "clip",
        (56, 14),
        17,
        _FULL,
        text={**_YARN, "vocab_size": 1000},
        often=True,
    ),
    Variant("rope-base", "mistral", (4, 2, 96), "siglip", (56, 14), 16, _LAST, text=_rope("default", rope_theta=1e6)),
)
