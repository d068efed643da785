"""Transformers' own processor and model of a family, which bundles are compared with; nothing of vkvx runs in it."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
import transformers
from PIL import Image
from transformers import AutoConfig, AutoImageProcessor, AutoTokenizer
from transformers.models.llava_next.modeling_llava_next import image_size_to_num_patches
from transformers.processing_utils import ProcessorMixin
from video_reference import KINDS, video_processor

IMAGE_TOKEN = 3
"""Of all checkpoints that ``vkvx.models.presets`` describes."""


class Reference:
    """A checkpoint in FP32 with eager attention, and the processor class of its architecture."""

    def __init__(self, directory: Path) -> None:
        config = self.config = AutoConfig.from_pretrained(directory)
        self.kind: str = config.model_type
        self.tokenizer: Any = AutoTokenizer.from_pretrained(directory, local_files_only=True)
        self.images: Any = AutoImageProcessor.from_pretrained(directory, backend="pil", local_files_only=True)
        self.videos: Any = video_processor(directory, self.kind) if self.kind in KINDS else None
        self.processor = self._processor(config)
        self.picture = str(self.tokenizer.convert_ids_to_tokens(IMAGE_TOKEN))
        """Stands for a picture in a prompt."""
        if self.kind == "gemma3":
            self.picture = self.processor.boi_token
        self.model: Any = getattr(transformers, config.architectures[0]).from_pretrained(
            directory, dtype=torch.float32, attn_implementation="eager"
        )
        self.model.eval().generation_config.eos_token_id = None  # so that answers have their full lengths

    def _processor(self, config: Any) -> Any:
        vision, parts = config.vision_config, {"image_processor": self.images, "tokenizer": self.tokenizer}
        # Processors with videos check for a video processor, which needs torchvision.
        with mock.patch.object(ProcessorMixin, "check_argument_for_proper_class"):
            if vision.model_type == "pixtral" and self.kind != "lighton_ocr":
                merge = getattr(config, "spatial_merge_size", 1)
                return _pixtral_processor()(**parts, patch_size=vision.patch_size, spatial_merge_size=merge)
            if self.kind == "lighton_ocr":
                return transformers.LightOnOcrProcessor(
                    **parts, patch_size=vision.patch_size, spatial_merge_size=config.spatial_merge_size
                )
            if self.kind == "llava":
                strategy = config.vision_feature_select_strategy
                return transformers.LlavaProcessor(
                    **parts,
                    patch_size=vision.patch_size,
                    vision_feature_select_strategy=strategy,
                    num_additional_image_tokens=int(vision.model_type == "clip_vision_model"),
                )
            if self.kind == "llava_next":
                return transformers.LlavaNextProcessor(
                    **parts,
                    patch_size=vision.patch_size,
                    vision_feature_select_strategy=config.vision_feature_select_strategy,
                    num_additional_image_tokens=int(vision.model_type == "clip_vision_model"),
                )
            if self.kind == "llava_onevision":
                return transformers.LlavaOnevisionProcessor(
                    **parts,
                    video_processor=self.videos,
                    num_image_tokens=(vision.image_size // vision.patch_size) ** 2,
                    vision_feature_select_strategy=config.vision_feature_select_strategy,
                    vision_aspect_ratio=config.vision_aspect_ratio,
                )
            if self.kind == "internvl":
                tokens = int((vision.image_size[0] // vision.patch_size[0] * config.downsample_ratio) ** 2)
                return transformers.InternVLProcessor(**parts, video_processor=None, image_seq_length=tokens)
            if self.kind in ("qwen3_vl", "qwen3_5"):
                return transformers.Qwen3VLProcessor(**parts, video_processor=self.videos)
            if self.kind == "qwen2_5_vl":
                return transformers.Qwen2_5_VLProcessor(**parts, video_processor=self.videos)
            if self.kind == "qwen2_vl":
                return transformers.Qwen2VLProcessor(**parts, video_processor=self.videos)
            if self.kind in ("glm4v", "glm46v", "glm_ocr"):
                kind = transformers.Glm4vProcessor if self.kind == "glm4v" else transformers.Glm46VProcessor
                return kind(**parts, video_processor=None)
            if self.kind == "paddleocr_vl":
                return transformers.PaddleOCRVLProcessor(**parts)
            if self.kind == "gemma3":
                return transformers.Gemma3Processor(**parts, image_seq_length=config.mm_tokens_per_image)
            if self.kind == "gemma4":
                return transformers.Gemma4Processor(feature_extractor=None, video_processor=None, **parts)
            if self.kind == "paligemma":
                return transformers.PaliGemmaProcessor(**parts)
            # SmolVLMProcessor writes the same for pictures, and wants another package for videos.
            tokens = (vision.image_size // vision.patch_size // config.scale_factor) ** 2
            return transformers.Idefics3Processor(**parts, image_seq_len=tokens)

    def inputs(
        self,
        prompts: Sequence[str],
        pictures: Sequence[Sequence[Image.Image]],
        *,
        first: bool = True,
        videos: Sequence[np.ndarray] = (),
        rate: float = 2.0,
    ) -> dict[str, torch.Tensor]:
        """Model inputs of prompts that have ``picture`` once a picture, padded on the left.

        Those that go on with a conversation, not ``first``, get no begin-of-sequence token. ``videos`` are frames UINT8
        [T, height, width, 3], ``rate`` of them a second.
        """
        if self.kind == "paligemma" and not any(pictures):  # which its processor refuses
            (prompt,) = prompts
            return dict(self.tokenizer(f"{self.tokenizer.bos_token}{prompt}\n", return_tensors="pt"))
        given: Any = [list(row) for row in pictures]
        if self.kind not in ("idefics3", "smolvlm", "gemma3", "gemma4"):
            given = [picture for row in pictures for picture in row]
        clips: dict[str, Any] = {}
        if videos:
            facts = [
                {"total_num_frames": len(one), "fps": rate, "frames_indices": [*range(len(one))]} for one in videos
            ]
            clips = {"videos": list(videos), "video_metadata": facts}
        made = self.processor(
            **clips,
            images=given if any(pictures) else None,
            text=list(prompts),
            padding=True,
            return_tensors="pt",
            add_special_tokens=first,
        )
        tensors = {name: value for name, value in made.items() if isinstance(value, torch.Tensor)}
        tensors.pop("labels", None)
        return tensors

    def pixels(self, inputs: dict[str, torch.Tensor]) -> np.ndarray:
        """The pixels in model inputs, without what fills pictures up to the size of others; Pixtral's as patches."""
        pixels, vision = inputs["pixel_values"], self.config.vision_config
        if vision.model_type == "pixtral":
            side, patches = vision.patch_size, []
            for one, (height, width) in zip(pixels, inputs["image_sizes"].tolist(), strict=True):
                cut = one[:, :height, :width].unfold(1, side, side).unfold(2, side, side)
                patches.append(cut.permute(1, 2, 0, 3, 4).flatten(0, 1))
            return torch.cat(patches).numpy()
        if self.kind in ("llava_next", "llava_onevision"):
            grids, sizes = self.config.image_grid_pinpoints, inputs["image_sizes"]
            counts = [image_size_to_num_patches(size, grids, vision.image_size) for size in sizes]
            return np.concatenate([tiles[:count] for tiles, count in zip(pixels.numpy(), counts, strict=True)])
        if self.kind == "gemma4":
            return pixels[inputs["image_position_ids"][..., 0] >= 0].numpy()
        return pixels.numpy()

    def generate(self, inputs: dict[str, torch.Tensor], tokens: int) -> tuple[np.ndarray, np.ndarray]:
        """Greedy answers INT [B, tokens], and the logits FP32 [B, tokens, V] that each token was chosen from."""
        never = [IMAGE_TOKEN] if self.videos is None else [IMAGE_TOKEN, self.config.video_token_id]
        with torch.no_grad():
            output = self.model.generate(
                **inputs,
                max_new_tokens=tokens,
                do_sample=False,
                suppress_tokens=[*never, *(self.model.generation_config.suppress_tokens or ())],
                output_logits=True,
                return_dict_in_generate=True,
            )
        answers = output.sequences[:, inputs["input_ids"].shape[1] :]
        return answers.numpy(), torch.stack(output.logits, 1).float().numpy()


def _pixtral_processor() -> Any:
    """Its module asks for torchvision, for a function that comes with the image processor for Pillow, too."""
    from transformers.models.pixtral import image_processing_pil_pixtral

    own = "transformers.models.pixtral.image_processing_pixtral"
    with mock.patch.dict(sys.modules, {own: image_processing_pil_pixtral}):
        from transformers.models.pixtral.processing_pixtral import PixtralProcessor
    return PixtralProcessor


def joined(
    first: dict[str, torch.Tensor], answer: np.ndarray, second: dict[str, torch.Tensor]
) -> dict[str, torch.Tensor]:
    """Inputs of a conversation: those of its first prompt, the answer INT [tokens], those of its second prompt."""
    whole = {}
    for name in {**first, **second}:
        if name not in first or name not in second:  # pictures or videos of one of them
            whole[name] = first.get(name, second.get(name))
            continue
        between = [torch.tensor(answer)[None]] if name == "input_ids" else []
        if name in ("attention_mask", "mm_token_type_ids", "token_type_ids"):
            between = [torch.full((1, len(answer)), int(name == "attention_mask"))]
        parts = [first[name], *between, second[name]]
        if name == "pixel_values" and "image_sizes" in first:  # a picture is filled up to the size of the largest
            parts = _filled(parts)
        # Idefics3 and SmolVLM have an axis for the rows of a batch in front of that for tiles.
        tiled = "pixel_attention_mask" in first and name.startswith("pixel")
        in_rows = tiled or first[name].shape[1:2] == first["input_ids"].shape[1:]
        whole[name] = torch.cat(parts, int(in_rows))
    return whole


def _filled(parts: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """Tensors with zeros behind what they have, so that they differ in their first axis alone."""
    sizes = [max(part.shape[axis] for part in parts) for axis in range(1, parts[0].dim())]
    filled = []
    for part in parts:
        whole = part.new_zeros(part.shape[0], *sizes)
        whole[tuple(slice(size) for size in part.shape)] = part
        filled.append(whole)
    return filled


def picture(width: int, height: int, seed: int) -> Image.Image:
    """A picture of coarse noise."""
    noise = np.random.default_rng(seed).integers(0, 256, (7, 9, 3), np.uint8)
    return Image.fromarray(noise).resize((width, height), Image.Resampling.BICUBIC)
