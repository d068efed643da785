"""Configs of tiny models with the structure of real ones, for tests."""

from __future__ import annotations

from typing import Any

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
_TINY_SIGLIP = {
    **_TINY_VISION,
    "model_type": "siglip_vision_model",
    "image_size": 56,
    "patch_size": 14,
    "vision_use_head": False,
}
_TINY_GEMMA4 = {
    **_TINY_TEXT,
    "model_type": "gemma4_text",
    "global_head_dim": 96,
    "sliding_window": 24,
    "final_logit_softcapping": 3.0,
}
_TINY_GEMMA4_VISION = {**_TINY_VISION, "num_key_value_heads": 2, "head_dim": 32, "position_embedding_size": 64}
_GEMMA4_TOKENS = {
    "boi_token_id": 4,
    "eoi_token_id": 5,
    "audio_token_id": 6,
    "boa_token_id": 7,
    "eoa_token_index": 8,
    "video_token_id": 9,
}
CLIP = {"model_type": "clip_vision_model", "image_size": 336, "patch_size": 14}
LLAMA = {"model_type": "llama", "vocab_size": 32064, "max_position_embeddings": 4096, "rms_norm_eps": 1e-5}
INTERNVIT_300M = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16}
TINY_PRESETS: dict[str, dict[str, Any]] = {
    "tiny": {
        "model_type": "llava",
        "vision_config": {**CLIP, **_TINY_VISION, "image_size": 56},
        "text_config": {**LLAMA, **_TINY_TEXT},
    },
    "tiny-llava-next": {
        "model_type": "llava_next",
        "vision_config": {**CLIP, **_TINY_VISION, "image_size": 56},
        "text_config": {**LLAMA, **_TINY_TEXT},
        "image_grid_pinpoints": [[56, 112], [112, 56], [112, 112], [168, 56], [56, 168]],
    },
    "tiny-llava-next-mistral": {
        "model_type": "llava_next",
        "vision_config": {**CLIP, **_TINY_VISION, "image_size": 56},
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
    "tiny-qwen3.5": {
        "model_type": "qwen3_5",
        "vision_config": {
            "depth": 2,
            "hidden_size": 64,
            "num_heads": 2,
            "intermediate_size": 96,
            "out_hidden_size": 256,
            "num_position_embeddings": 36,
        },
        "text_config": {
            **_TINY_TEXT,
            "model_type": "qwen3_5_text",
            "num_hidden_layers": 4,  # the last one is full attention
            "hidden_size": 256,
            "num_key_value_heads": 1,
            "head_dim": 256,
            "linear_key_head_dim": 32,
            "linear_value_head_dim": 48,
            "linear_num_key_heads": 2,
            "linear_num_value_heads": 4,
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": 10000.0,
                "mrope_section": [12, 10, 10],
                "mrope_interleaved": True,
                "partial_rotary_factor": 0.25,
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
    "tiny-gemma3": {
        "model_type": "gemma3",
        "vision_config": {
            **_TINY_VISION,
            "model_type": "siglip_vision_model",
            "image_size": 112,
            "patch_size": 14,
            "vision_use_head": False,
        },
        "text_config": {
            **_TINY_TEXT,
            "model_type": "gemma3_text",
            "num_hidden_layers": 3,
            "sliding_window": 24,
            "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
            "query_pre_attn_scalar": 48,
            "rope_parameters": {
                "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0},
                "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
            },
        },
        "mm_tokens_per_image": 16,
        "boi_token_index": 4,
        "eoi_token_index": 5,
    },
    "tiny-paligemma": {
        "model_type": "paligemma",
        "vision_config": _TINY_SIGLIP,
        "text_config": {**_TINY_TEXT, "model_type": "gemma"},
        "projection_dim": 128,
        "hidden_size": 128,
    },
    "tiny-paligemma2": {
        "model_type": "paligemma",
        "vision_config": _TINY_SIGLIP,
        "text_config": {
            **_TINY_TEXT,
            "model_type": "gemma2",
            "sliding_window": 24,
            "query_pre_attn_scalar": 48,
            "attn_logit_softcapping": 5.0,
            "final_logit_softcapping": 3.0,
        },
        "projection_dim": 128,
        "hidden_size": 128,
    },
    "tiny-gemma4": {
        "model_type": "gemma4",
        "vision_config": {**_TINY_GEMMA4_VISION, "standardize": True},
        "audio_config": None,
        "text_config": {
            **_TINY_GEMMA4,
            "num_hidden_layers": 3,
            "num_global_key_value_heads": 1,
            "attention_k_eq_v": True,
            "layer_types": ["sliding_attention", "sliding_attention", "full_attention"],
            "use_bidirectional_attention": "vision",
            "hidden_size_per_layer_input": 0,
        },
        **_GEMMA4_TOKENS,
    },
    "tiny-gemma4-e": {
        "model_type": "gemma4",
        "vision_config": {**_TINY_GEMMA4_VISION, "use_clipped_linears": True},
        "audio_config": {"hidden_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2, "output_proj_dims": 96},
        "text_config": {
            **_TINY_GEMMA4,
            "num_hidden_layers": 6,
            "num_kv_shared_layers": 3,
            "use_double_wide_mlp": True,
            "layer_types": ["sliding_attention", "sliding_attention", "full_attention"] * 2,
            "hidden_size_per_layer_input": 32,
            "vocab_size_per_layer_input": 512,
        },
        **_GEMMA4_TOKENS,
    },
}
"""What differs from the defaults of transformers' config classes."""
