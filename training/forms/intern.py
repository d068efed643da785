"""tiny-intern: InternVL's form. A page is cut into tiles of 168 pixels, 36 visual tokens each, with a thumbnail."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import (
    InternVLConfig,
    InternVLForConditionalGeneration,
    InternVLVisionConfig,
    PreTrainedTokenizerFast,
    Qwen3Config,
)
from transformers.models.got_ocr2.image_processing_pil_got_ocr2 import GotOcr2ImageProcessorPil

from training.forms.base import Form, Layout, cells_of, settle_generation
from training.forms.templates import TURNS
from vkvx.models.processor_files import ProcessorFiles
from vkvx.models.tiny_llava import data

TILE, SIDE = 168, 6
"""Pixels and tokens along the side of a tile: 2 x 3 cells of a page at its full size."""


def _layout(rows: int, columns: int, share: float) -> Layout:
    """A page of tiles in reading order, the whole page behind them if there is more than one."""
    cells: list[int] = []
    for row in range(0, rows, 2):
        for column in range(0, columns, 3):
            cells += cells_of(SIDE, SIDE, 2, 3, first=row * data.COLUMNS + column)
    if rows * columns > 6:
        cells += cells_of(SIDE, SIDE, rows, columns)
    size = rows * data.CELL_HEIGHT, columns * data.CELL_WIDTH
    return Layout(rows, columns, size, tuple(cells), share)


class TinyIntern(Form):
    """``InternVLForConditionalGeneration`` with a Qwen3 decoder, as in InternVL3.5."""

    name = "tiny-intern"
    layouts = tuple(_layout(*part, share) for part, share in zip(data.PARTS, (0.61, 0.13, 0.13, 0.13), strict=True))
    kinds = {"transcribe": 0.5, "row": 0.25, "cell": 0.25}
    pad, bos, eos, image = "<|endoftext|>", None, "<|im_end|>", "<IMG_CONTEXT>"
    marks = {
        "turn_token": "<|im_start|>",
        "context_image_token": "<IMG_CONTEXT>",
        "start_image_token": "<img>",
        "end_image_token": "</img>",
        "video_token": "<video>",
    }
    mean, std = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
    template = TURNS.replace("IMAGE", "<IMG_CONTEXT>\\n").replace("VIDEO", "<video>\\n")
    lead, after = "", "\n"

    def turn(self, prompt: str, images: int) -> str:
        """As in InternVL3."""
        return (
            f"<|im_start|>user\n{f'<img><IMG_CONTEXT></img>{chr(10)}' * images}{prompt}<|im_end|>\n"
            "<|im_start|>assistant\n"
        )

    def processor(self, tokenizer: PreTrainedTokenizerFast) -> ProcessorFiles:
        """Tiles of the image processor that InternVL shares with GOT-OCR."""
        images = GotOcr2ImageProcessorPil(
            size={"height": TILE, "width": TILE}, crop_to_patches=True,
            image_mean=list(self.mean), image_std=list(self.std),
        )  # fmt: skip
        return ProcessorFiles(tokenizer, images, self.template)

    def build(self, tokenizer: PreTrainedTokenizerFast) -> InternVLForConditionalGeneration:
        """5.1 million parameters."""
        vision = InternVLVisionConfig(
            hidden_size=192,
            intermediate_size=768,
            num_hidden_layers=5,
            num_attention_heads=3,
            attention_bias=True,
            image_size=(TILE, TILE),
            patch_size=(14, 14),
            layer_scale_init_value=1.0,
        )
        text = Qwen3Config(
            vocab_size=len(tokenizer),
            hidden_size=256,
            intermediate_size=512,
            num_hidden_layers=4,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=64,
            max_position_embeddings=4096,
            bos_token_id=None,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
            tie_word_embeddings=True,
            rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        )
        config = InternVLConfig(
            vision_config=vision,
            text_config=text,
            image_token_id=tokenizer.convert_tokens_to_ids(self.image),
            image_seq_length=SIDE**2,
            tie_word_embeddings=True,
        )
        model = InternVLForConditionalGeneration(config)
        settle_generation(model, tokenizer)
        return model

    def features(self, model: Any, pictures: Tensor, layout: Layout) -> tuple[Tensor, list[Tensor]]:
        """Tiles row by row and the thumbnail, which the image processor makes of the page by itself."""
        count, down, across = len(pictures), layout.rows // 2, layout.columns // 3
        tiles = pictures.unflatten(3, (across, TILE)).unflatten(2, (down, TILE))  # [P, 3, down, 168, across, 168]
        tiles = tiles.permute(0, 2, 4, 1, 3, 5).flatten(1, 2)
        if down * across > 1:
            small = torch.nn.functional.interpolate(
                pictures.float(), (TILE, TILE), mode="bicubic", antialias=True, align_corners=False
            )
            tiles = torch.cat([tiles, small[:, None].to(tiles.dtype)], 1)
        found = model.get_image_features(tiles.flatten(0, 1)).pooler_output
        return found.reshape(count, layout.tokens, -1), []
