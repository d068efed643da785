"""Configs of known sizes and of tiny models, and processor files that suit them: for checkpoints of random weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from vkvx.models.processor_files import ProcessorFiles
from vkvx.models.registry import TINY_LLAVA

_TINY_TEXT = {
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "vocab_size": 512,
    "max_position_embeddings": 4096,
}
_TINY_VISION = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 3, "num_attention_heads": 2}
_TINY_QWEN = {
    **{name: value for name, value in _TINY_TEXT.items() if name != "head_dim"},  # which Qwen's layers do not look at
    "hidden_size": 256,
    "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [8, 12, 12]},
}
_TINY_GLM_ROPE = {
    "rope_type": "default",
    "rope_theta": 10000.0,
    "mrope_section": [4, 6, 6],
    "partial_rotary_factor": 0.5,
}
_TINY_PIXTRAL = {**_TINY_VISION, "model_type": "pixtral", "image_size": 112, "patch_size": 14}
_CLIP = {"model_type": "clip_vision_model", "image_size": 336, "patch_size": 14}
_LLAMA = {"model_type": "llama", "vocab_size": 32064, "max_position_embeddings": 4096, "rms_norm_eps": 1e-5}
_INTERNVIT_300M = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16}
PRESETS: dict[str, dict[str, Any]] = {
    "llava-1.5-7b": {
        "model_type": "llava",
        "vision_config": {
            **_CLIP,
            "hidden_size": 1024,
            "intermediate_size": 4096,
            "num_hidden_layers": 24,
            "num_attention_heads": 16,
        },
        "text_config": {
            **_LLAMA,
            "hidden_size": 4096,
            "intermediate_size": 11008,
            "num_hidden_layers": 32,
            "num_attention_heads": 32,
        },
    },
    "200m": {
        "model_type": "llava",
        "vision_config": {
            **_CLIP,
            "hidden_size": 384,
            "intermediate_size": 1536,
            "num_hidden_layers": 12,
            "num_attention_heads": 6,
        },
        "text_config": {
            **_LLAMA,
            "hidden_size": 1024,
            "intermediate_size": 2816,
            "num_hidden_layers": 12,
            "num_attention_heads": 16,
            "num_key_value_heads": 8,
        },
    },
    "tiny": {
        "model_type": "llava",
        "vision_config": {**_CLIP, **_TINY_VISION, "image_size": 56},
        "text_config": {**_LLAMA, **_TINY_TEXT},
    },
    "tiny-llava-next": {
        "model_type": "llava_next",
        "vision_config": {**_CLIP, **_TINY_VISION, "image_size": 56},
        "text_config": {**_LLAMA, **_TINY_TEXT},
        "image_grid_pinpoints": [[56, 112], [112, 56], [112, 112], [168, 56], [56, 168]],
    },
    "tiny-llava-next-mistral": {
        "model_type": "llava_next",
        "vision_config": {**_CLIP, **_TINY_VISION, "image_size": 56},
        "text_config": {**_TINY_TEXT, "model_type": "mistral", "sliding_window": None},
        "image_grid_pinpoints": [[56, 112], [112, 56], [112, 112], [168, 56], [56, 168]],
    },
    "tiny-granite-vision": {
        "model_type": "llava_next",
        "vision_config": {
            **_TINY_VISION,
            "model_type": "siglip_vision_model",
            "image_size": 60,
            "patch_size": 14,
            "vision_use_head": False,
        },
        "text_config": {
            **_TINY_TEXT,
            "model_type": "granite",
            "tie_word_embeddings": True,
            "embedding_multiplier": 3.0,
            "residual_multiplier": 0.5,
            "attention_multiplier": 0.1,
            "logits_scaling": 2.0,
        },
        "tie_word_embeddings": True,
        "vision_feature_layer": [-3, -1],
        "vision_feature_select_strategy": "full",
        "image_grid_pinpoints": [[60, 120], [120, 60], [120, 120]],
    },
    "tiny-llava-onevision": {
        "model_type": "llava_onevision",
        "vision_config": {
            **_TINY_VISION,
            "model_type": "siglip_vision_model",
            "image_size": 60,
            "patch_size": 14,
            "vision_use_head": False,
        },
        "text_config": {**_TINY_TEXT, "model_type": "qwen2"},
        "image_grid_pinpoints": [[60 * rows, 60 * columns] for rows in (1, 2, 3) for columns in (1, 2, 3)],
        "vision_aspect_ratio": "anyres_max_2",
    },
    "internvl3-8b": {
        "model_type": "internvl",
        "vision_config": {**_INTERNVIT_300M, "image_size": [448, 448], "patch_size": [14, 14]},
        "text_config": {
            "model_type": "qwen2",
            "hidden_size": 3584,
            "intermediate_size": 18944,
            "num_hidden_layers": 28,
            "num_attention_heads": 28,
            "num_key_value_heads": 4,
            "vocab_size": 151674,
            "max_position_embeddings": 32768,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e6},
        },
    },
    "internvl3-38b": {
        "model_type": "internvl",
        "vision_config": {
            "hidden_size": 3200,
            "intermediate_size": 12800,
            "num_hidden_layers": 45,
            "num_attention_heads": 25,
            "image_size": [448, 448],
            "patch_size": [14, 14],
            "use_qk_norm": True,
            "norm_type": "rms_norm",
        },
        "text_config": {
            "model_type": "qwen2",
            "hidden_size": 5120,
            "intermediate_size": 27648,
            "num_hidden_layers": 64,
            "num_attention_heads": 40,
            "num_key_value_heads": 8,
            "vocab_size": 151674,
            "max_position_embeddings": 32768,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e6},
        },
    },
    "tiny-internvl": {
        "model_type": "internvl",
        "vision_config": {**_TINY_VISION, "image_size": [56, 56], "patch_size": [14, 14]},
        "text_config": {**_TINY_TEXT, "model_type": "qwen2"},
    },
    "tiny-internvl-qwen3": {
        "model_type": "internvl",
        "vision_config": {
            **_TINY_VISION,
            "image_size": [56, 56],
            "patch_size": [14, 14],
            "use_qk_norm": True,
            "norm_type": "rms_norm",
        },
        "text_config": {**_TINY_TEXT, "model_type": "qwen3", "tie_word_embeddings": True},
        "tie_word_embeddings": True,
    },
    "smolvlm2-2.2b": {
        "model_type": "smolvlm",
        "vision_config": {
            "hidden_size": 1152,
            "intermediate_size": 4304,
            "num_hidden_layers": 27,
            "num_attention_heads": 16,
            "image_size": 384,
            "patch_size": 14,
        },
        "text_config": {
            "model_type": "llama",
            "hidden_size": 2048,
            "intermediate_size": 8192,
            "num_hidden_layers": 24,
            "num_attention_heads": 32,
            "num_key_value_heads": 32,
            "vocab_size": 49280,
            "max_position_embeddings": 8192,
            "rope_parameters": {"rope_type": "default", "rope_theta": 130000.0},
        },
        "scale_factor": 3,
    },
    "tiny-smolvlm": {
        "model_type": "smolvlm",
        "vision_config": {**_TINY_VISION, "image_size": 62, "patch_size": 10},
        "text_config": {
            **_TINY_TEXT,
            "model_type": "llama",
            "hidden_size": 192,
            "num_attention_heads": 6,
            "num_key_value_heads": 3,
            "head_dim": 32,
        },
        "scale_factor": 3,
    },
    "tiny-qwen2-vl": {
        "model_type": "qwen2_vl",
        "vision_config": {
            "depth": 2,
            "embed_dim": 64,
            "num_heads": 2,
            "hidden_size": 256,
            "mlp_ratio": 2,
            "patch_size": 14,
            "spatial_merge_size": 2,
        },
        "text_config": {**_TINY_QWEN, "model_type": "qwen2_vl_text"},
    },
    "tiny-qwen2.5-vl": {
        "model_type": "qwen2_5_vl",
        "vision_config": {
            "depth": 3,
            "hidden_size": 64,
            "num_heads": 2,
            "intermediate_size": 96,
            "out_hidden_size": 256,
            "window_size": 56,
            "fullatt_block_indexes": [1],
        },
        "text_config": {**_TINY_QWEN, "model_type": "qwen2_5_vl_text"},
    },
    "qwen2.5-vl-7b": {
        "model_type": "qwen2_5_vl",
        "vision_config": {
            "depth": 32,
            "hidden_size": 1280,
            "num_heads": 16,
            "intermediate_size": 3420,
            "out_hidden_size": 3584,
        },
        "text_config": {
            "model_type": "qwen2_5_vl_text",
            "hidden_size": 3584,
            "intermediate_size": 18944,
            "num_hidden_layers": 28,
            "num_attention_heads": 28,
            "num_key_value_heads": 4,
            "vocab_size": 152064,
            "max_position_embeddings": 128000,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [16, 24, 24]},
        },
    },
    "qwen3-vl-8b": {
        "model_type": "qwen3_vl",
        "vision_config": {
            "depth": 27,
            "hidden_size": 1152,
            "num_heads": 16,
            "intermediate_size": 4304,
            "out_hidden_size": 4096,
            "deepstack_visual_indexes": [8, 16, 24],
        },
        "text_config": {
            "model_type": "qwen3_vl_text",
            "hidden_size": 4096,
            "intermediate_size": 12288,
            "num_hidden_layers": 36,
            "num_attention_heads": 32,
            "num_key_value_heads": 8,
            "head_dim": 128,
            "vocab_size": 151936,
            "max_position_embeddings": 262144,
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": 5e6,
                "mrope_section": [24, 20, 20],
                "mrope_interleaved": True,
            },
        },
    },
    "tiny-qwen3-vl": {
        "model_type": "qwen3_vl",
        "vision_config": {
            "depth": 3,
            "hidden_size": 64,
            "num_heads": 2,
            "intermediate_size": 96,
            "out_hidden_size": 128,
            "num_position_embeddings": 36,
            "deepstack_visual_indexes": [0, 2],
        },
        "text_config": {
            **_TINY_TEXT,
            "model_type": "qwen3_vl_text",
            "num_hidden_layers": 3,
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": 10000.0,
                "mrope_section": [12, 10, 10],
                "mrope_interleaved": True,
            },
        },
    },
    "tiny-glm-4.1v": {
        "model_type": "glm4v",
        "vision_config": {
            "depth": 2,
            "hidden_size": 64,
            "num_heads": 2,
            "out_hidden_size": 256,
            "intermediate_size": 96,
            "image_size": 112,
        },
        "text_config": {**_TINY_QWEN, "model_type": "glm4v_text", "rope_parameters": _TINY_GLM_ROPE},
    },
    "tiny-glm-4.6v": {
        "model_type": "glm46v",
        "vision_config": {
            "model_type": "glm4v_vision",
            "depth": 2,
            "hidden_size": 64,
            "num_heads": 2,
            "out_hidden_size": 256,
            "intermediate_size": 96,
            "image_size": 112,
        },
        "text_config": {**_TINY_QWEN, "model_type": "glm4v_text", "rope_parameters": _TINY_GLM_ROPE},
    },
    "tiny-glm-ocr": {
        "model_type": "glm_ocr",
        "vision_config": {
            "depth": 2,
            "hidden_size": 64,
            "num_heads": 2,
            "out_hidden_size": 256,
            "intermediate_size": 96,
        },
        "text_config": {**_TINY_QWEN, "model_type": "glm_ocr_text"},
    },
    "tiny-paddleocr-vl": {
        "model_type": "paddleocr_vl",
        "vision_config": {**_TINY_VISION, "image_size": 70, "patch_size": 14},
        "text_config": {**_TINY_QWEN, "model_type": "paddleocr_vl_text", "head_dim": 64},
    },
    "tiny-pixtral": {
        "model_type": "llava",
        "vision_config": _TINY_PIXTRAL,
        "text_config": {**_TINY_TEXT, "model_type": "mistral", "sliding_window": None},
        "vision_feature_layer": -1,
        "vision_feature_select_strategy": "full",
    },
    "tiny-mistral3": {
        "model_type": "mistral3",
        "vision_config": _TINY_PIXTRAL,
        "text_config": {**_TINY_TEXT, "model_type": "mistral", "sliding_window": None},
        "tie_word_embeddings": False,
    },
    "tiny-ministral3": {
        "model_type": "mistral3",
        "vision_config": _TINY_PIXTRAL,
        "text_config": {
            **_TINY_TEXT,
            "model_type": "ministral3",
            "rope_parameters": {
                "rope_type": "yarn",
                "rope_theta": 1e6,
                "factor": 16.0,
                "original_max_position_embeddings": 64,  # so that prompts of tests are longer
                "beta_fast": 32.0,
                "beta_slow": 1.0,
                "mscale": 1.0,
                "mscale_all_dim": 1.0,
                "llama_4_scaling_beta": 0.1,
            },
            "tie_word_embeddings": True,
        },
    },
    "tiny-lightonocr": {
        "model_type": "lighton_ocr",
        "vision_config": _TINY_PIXTRAL,
        "text_config": {**_TINY_TEXT, "model_type": "qwen3", "tie_word_embeddings": True},
    },
    "tiny-idefics3": {
        "model_type": "idefics3",
        "vision_config": {**_TINY_VISION, "image_size": 56, "patch_size": 14},
        "text_config": {**_TINY_TEXT, "model_type": "llama", "tie_word_embeddings": True},
        "tie_word_embeddings": True,
        "scale_factor": 2,
    },
}
"""What differs from the defaults of transformers' config classes."""

_BEGIN, _END, _PAD = "<|im_start|>", "<|im_end|>", "<pad>"
_TURNS = (
    "{%- for message in messages -%}{{- '" + _BEGIN + "' + message['role'] + '\n' -}}"
    "{%- if message['content'] is string -%}{{- message['content'] -}}{%- else -%}"
    "{%- for part in message['content'] -%}"
    "{{- 'IMAGE\n' if part['type'] == 'image' else part['text'] -}}"
    "{%- endfor -%}{%- endif -%}{{- '" + _END + "\n' -}}{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{- '" + _BEGIN + "assistant\n' -}}{%- endif -%}"
)
"""A chat template; ``IMAGE`` is the family's image token."""


def preset_config(preset: str, layers: int | None = None) -> Any:
    """The transformers config of a preset, with another number of decoder layers if given."""
    from transformers import CONFIG_MAPPING

    sizes = PRESETS[preset]
    text = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, **sizes["text_config"]}
    if layers is not None:
        text["num_hidden_layers"] = layers
    given = {key: value for key, value in sizes.items() if key not in ("model_type", "text_config")}
    config = CONFIG_MAPPING[sizes["model_type"]](text_config=text, image_token_id=3, **given)
    if config.vision_config.model_type == "clip_vision_model" and sizes["model_type"] == "llava":
        vision = config.vision_config
        config.image_seq_length = (vision.image_size // vision.patch_size) ** 2
        config.vision_feature_layer, config.vision_feature_select_strategy = -2, "default"
    config.architectures = [_architecture(config)]
    return config


def write_processor(directory: Path, config: Any) -> None:
    """Processor files for a config of a preset."""
    if config.vision_config.model_type == "pixtral":
        from transformers.models.pixtral.image_processing_pil_pixtral import PixtralImageProcessorPil

        files = _files("[IMG]", {"image_break_token": "[IMG_BREAK]", "image_end_token": "[IMG_END]"})
        vision = config.vision_config
        files.images = PixtralImageProcessorPil(patch_size=vision.patch_size, size={"longest_edge": vision.image_size})
    elif config.model_type == "llava":
        files = ProcessorFiles.load(TINY_LLAVA)
        size = config.vision_config.image_size
        files.images.size = {"shortest_edge": size}
        files.images.crop_size = {"height": size, "width": size}
    elif config.model_type in ("llava_next", "llava_onevision"):
        from transformers.models.llava_next.image_processing_pil_llava_next import LlavaNextImageProcessorPil
        from transformers.models.llava_onevision.image_processing_pil_llava_onevision import (
            LlavaOnevisionImageProcessorPil,
        )

        size = dict.fromkeys(("height", "width"), config.vision_config.image_size)
        files = _files("<image>", {"video_token": "<video>"})
        if config.model_type == "llava_next":
            crop = {"size": {"shortest_edge": size["height"]}, "crop_size": size}
            files.images = LlavaNextImageProcessorPil(**crop, image_grid_pinpoints=config.image_grid_pinpoints)
        else:
            files.images = LlavaOnevisionImageProcessorPil(size=size, image_grid_pinpoints=config.image_grid_pinpoints)
    elif config.model_type == "internvl":
        from transformers.models.got_ocr2.image_processing_pil_got_ocr2 import GotOcr2ImageProcessorPil

        height, width = config.vision_config.image_size
        marks = {"start_image_token": "<img>", "end_image_token": "</img>", "video_token": "<video>"}
        files = _files("<IMG_CONTEXT>", {"context_image_token": "<IMG_CONTEXT>", **marks})
        files.images = GotOcr2ImageProcessorPil(size={"height": height, "width": width})
    elif config.model_type in ("qwen2_vl", "qwen2_5_vl", "qwen3_vl"):
        from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

        files = _files("<|image_pad|>", {}, before="<|vision_start|>", after="<|vision_end|>")
        files.images = Qwen2VLImageProcessorPil(
            patch_size=config.vision_config.patch_size, merge_size=config.vision_config.spatial_merge_size
        )
    elif config.model_type in ("glm4v", "glm46v", "glm_ocr"):
        from transformers.models.glm4v.image_processing_pil_glm4v import Glm4vImageProcessorPil
        from transformers.models.glm46v.image_processing_pil_glm46v import Glm46VImageProcessorPil

        marks = {"video_token": "<|video|>", "end_of_video_token": "<|end_of_video|>"}
        files = _files("<|image|>", marks, before="<|begin_of_image|>", after="<|end_of_image|>")
        files.images = (Glm4vImageProcessorPil if config.model_type == "glm4v" else Glm46VImageProcessorPil)()
    elif config.model_type == "paddleocr_vl":
        from transformers.models.paddleocr_vl.image_processing_pil_paddleocr_vl import PaddleOCRVLImageProcessorPil

        files = _files("<|IMAGE_PLACEHOLDER|>", {}, before="<|IMAGE_START|>", after="<|IMAGE_END|>")
        files.images = PaddleOCRVLImageProcessorPil()
    else:
        from transformers.models.idefics3.image_processing_pil_idefics3 import Idefics3ImageProcessorPil
        from transformers.models.smolvlm.image_processing_pil_smolvlm import SmolVLMImageProcessorPil

        size = config.vision_config.image_size
        marks = {"fake_image_token": "<fake_token_around_image>", "image_token": "<image>", "whole": "<global-img>"}
        places = {f"{r}{c}": f"<row_{r}_col_{c}>" for r in range(1, 7) for c in range(1, 7)}
        files = _files("<image>", {**marks, **places, "end_of_utterance_token": "<end_of_utterance>"})
        kind = SmolVLMImageProcessorPil if config.model_type == "smolvlm" else Idefics3ImageProcessorPil
        files.images = kind(size={"longest_edge": 4 * size}, max_image_size={"longest_edge": size})
    files.save(directory)


def _architecture(config: Any) -> str:
    from transformers import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING

    name: str = MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING[type(config)].__name__
    return name


def _files(image_token: str, marks: dict[str, str], before: str = "", after: str = "") -> ProcessorFiles:
    """A tokenizer of bytes, with the image token at 3 and these marks; the image processor is still missing.

    ``before`` and ``after`` are tokens that the chat template writes around the image token.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    special = [*dict.fromkeys((_PAD, _BEGIN, _END, image_token, *marks.values(), before, after))]
    special = [token for token in special if token]
    tokens = [*special, *sorted(pre_tokenizers.ByteLevel.alphabet())]
    tokenizer = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(tokens)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=_PAD,
        eos_token=_END,
        extra_special_tokens={"turn_token": _BEGIN, "image_token": image_token, **marks},
        additional_special_tokens=[token for token in (before, after) if token],
        padding_side="left",
    )
    return ProcessorFiles(wrapped, None, _TURNS.replace("IMAGE", before + image_token + after))
