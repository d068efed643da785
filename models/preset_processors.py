"""Processor files for the configs of :mod:`vkvx.models.presets`: a tokenizer of bytes, the real image processor."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from vkvx.models.processor_files import ProcessorFiles
from vkvx.models.registry import TINY_LLAVA

_BEGIN, _END, _PAD = "<|im_start|>", "<|im_end|>", "<pad>"
_TURNS = (
    "{%- for message in messages -%}{{- '" + _BEGIN + "' + message['role'] + '\n' -}}"
    "{%- if message['content'] is string -%}{{- message['content'] -}}{%- else -%}"
    "{%- for part in message['content'] -%}"
    "{{- 'IMAGE\n' if part['type'] == 'image' else 'VIDEO\n' if part['type'] == 'video' else part['text'] -}}"
    "{%- endfor -%}{%- endif -%}{{- '" + _END + "\n' -}}{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{- '" + _BEGIN + "assistant\n' -}}{%- endif -%}"
)
"""A chat template; ``IMAGE`` and ``VIDEO`` are the family's tokens for a picture and a video."""


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
        if config.vision_config.model_type == "siglip_vision_model":
            from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

            files.images = SiglipImageProcessorPil(size={"height": size, "width": size})
        else:
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
    elif config.model_type in ("qwen2_vl", "qwen2_5_vl", "qwen3_vl", "qwen3_5"):
        from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

        marks = {"video_token": "<|video_pad|>"}
        files = _files("<|image_pad|>", marks, before="<|vision_start|>", after="<|vision_end|>")
        files.images = Qwen2VLImageProcessorPil(
            patch_size=config.vision_config.patch_size, merge_size=config.vision_config.spatial_merge_size
        )
    elif config.model_type in ("glm4v", "glm46v", "glm_ocr"):
        from transformers.models.glm4v.image_processing_pil_glm4v import Glm4vImageProcessorPil
        from transformers.models.glm46v.image_processing_pil_glm46v import Glm46VImageProcessorPil

        marks = {"video_token": "<|video|>", "end_of_video_token": "<|end_of_video|>"}
        files = _files("<|image|>", marks, before="<|begin_of_image|>", after="<|end_of_image|>")
        files.images = (Glm4vImageProcessorPil if config.model_type == "glm4v" else Glm46VImageProcessorPil)()
    elif config.model_type == "gemma3":
        from transformers.models.gemma3.image_processing_pil_gemma3 import Gemma3ImageProcessorPil

        marks = {"boi_token": "<start_of_image>", "eoi_token": "<end_of_image>"}
        files = _files("<image_soft_token>", marks, picture="<start_of_image>")
        files.images = Gemma3ImageProcessorPil(size=dict.fromkeys(("height", "width"), config.vision_config.image_size))
    elif config.model_type == "gemma4":
        from transformers.models.gemma4.image_processing_pil_gemma4 import Gemma4ImageProcessorPil

        marks = {"boi_token": "<|image>", "eoi_token": "<image|>", "audio_token": "<|audio|>"}
        marks |= {"boa_token": "<|audio>", "eoa_token": "<audio|>", "video_token": "<|video|>"}
        files = _files("<|image|>", marks)
        files.images = Gemma4ImageProcessorPil(max_soft_tokens=70)
    elif config.model_type == "paligemma":
        from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

        files, side = _files("<image>", {"bos_token": "<bos>"}), config.vision_config.image_size
        files.chat_template = None
        files.images = SiglipImageProcessorPil(
            size={"height": side, "width": side}, image_seq_length=config.text_config.num_image_tokens
        )
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


def _files(
    image_token: str, marks: dict[str, str], before: str = "", after: str = "", picture: str = ""
) -> ProcessorFiles:
    """A tokenizer of bytes, with the image token at 3 and these marks; the image processor is still missing.

    ``before`` and ``after`` are tokens that the chat template writes around the image token; ``picture`` is what it
    writes in place of that, if anything.
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
    video = marks.get("video_token", image_token)
    template = _TURNS.replace("IMAGE", before + (picture or image_token) + after).replace(
        "VIDEO", before + video + after
    )
    return ProcessorFiles(wrapped, None, template)
