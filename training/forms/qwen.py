"""tiny-qwen: Qwen3-VL's form. Pages of any size; 28 x 28 pixels make a visual token, positions have three parts."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import Tensor
from transformers import (
    PreTrainedTokenizerFast,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
    Qwen3VLTextConfig,
    Qwen3VLVisionConfig,
)
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil
from transformers.models.qwen3_vl.modeling_qwen3_vl import rotate_half

from training.forms.base import Form, Layout, cells_of, settle_generation
from training.forms.templates import TURNS
from vkvx.models.processor_files import ProcessorFiles
from vkvx.models.qwen3_vl import Qwen3VL
from vkvx.models.tiny_llava import data

PATCH, MERGE = 14, 2
TABLE = 24
"""Side of the learnt table of positions."""


def _block(block: Any, states: Tensor, rope: tuple[Tensor, Tensor]) -> Tensor:
    """A layer of the tower over [P, N, hidden]: as its ``forward``, for pictures that have equally many patches."""
    attention, (cos, sin) = block.attn, rope
    qkv = attention.qkv(block.norm1(states)).unflatten(-1, (3, attention.num_heads, attention.head_dim))
    query, key, value = qkv.unbind(2)  # [P, N, heads, dim]
    query, key = (part * cos + rotate_half(part) * sin for part in (query, key))
    parts = (part.transpose(1, 2) for part in (query, key, value))
    found = torch.nn.functional.scaled_dot_product_attention(*parts, scale=attention.scaling)
    states = states + attention.proj(found.transpose(1, 2).flatten(2))
    return states + block.mlp(block.norm2(states))


def _layout(down: int, across: int, share: float, rows: int = data.ROWS, columns: int = data.COLUMNS) -> Layout:
    side = PATCH * MERGE
    cells = cells_of(down, across, rows, columns)
    return Layout(rows, columns, (down * side, across * side), tuple(cells), share, (down, across))


class TinyQwen(Form):
    """``Qwen3VLForConditionalGeneration``."""

    name = "tiny-qwen"
    layouts = (
        _layout(12, 12, 0.36),
        *(_layout(3 * rows, 2 * columns, 0.1, rows, columns) for rows, columns in data.PARTS[1:]),
        *(_layout(*grid, 0.085) for grid in ((10, 10), (14, 10), (10, 14), (14, 14))),  # pages scaled
    )
    kinds = {"transcribe": 0.5, "row": 0.25, "cell": 0.25}
    pad, bos, eos, image = "<|endoftext|>", None, "<|im_end|>", "<|image_pad|>"
    marks = {
        "turn_token": "<|im_start|>",
        "vision_start_token": "<|vision_start|>",
        "vision_end_token": "<|vision_end|>",
        "video_token": "<|video_pad|>",
    }
    mean = std = (0.5, 0.5, 0.5)
    template = TURNS.replace("IMAGE", "<|vision_start|><|image_pad|><|vision_end|>").replace(
        "VIDEO", "<|vision_start|><|video_pad|><|vision_end|>"
    )
    lead, after = "", "\n"
    wide_positions = True

    def turn(self, prompt: str, images: int) -> str:
        """As in Qwen3-VL."""
        shown = "<|vision_start|><|image_pad|><|vision_end|>" * images
        return f"<|im_start|>user\n{shown}{prompt}<|im_end|>\n<|im_start|>assistant\n"

    def processor(self, tokenizer: PreTrainedTokenizerFast) -> ProcessorFiles:
        """Pictures of 16 to 256 tokens; others are scaled."""
        side = PATCH * MERGE
        images = Qwen2VLImageProcessorPil(
            patch_size=PATCH, merge_size=MERGE, image_mean=list(self.mean), image_std=list(self.std),
            size={"shortest_edge": (4 * side) ** 2, "longest_edge": (16 * side) ** 2},
        )  # fmt: skip
        return ProcessorFiles(tokenizer, images, self.template)

    def build(self, tokenizer: PreTrainedTokenizerFast) -> Qwen3VLForConditionalGeneration:
        """5.7 million parameters."""
        vision = Qwen3VLVisionConfig(
            depth=5,
            hidden_size=192,
            num_heads=3,
            intermediate_size=512,
            patch_size=PATCH,
            spatial_merge_size=MERGE,
            out_hidden_size=256,
            num_position_embeddings=TABLE**2,
            deepstack_visual_indexes=[2],
        )
        text = Qwen3VLTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=256,
            intermediate_size=384,
            num_hidden_layers=4,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=64,
            max_position_embeddings=4096,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
            rope_parameters={
                "rope_type": "default", "rope_theta": 10000.0, "mrope_section": [12, 10, 10], "mrope_interleaved": True
            },
        )  # fmt: skip
        ids = {name: tokenizer.convert_tokens_to_ids(token) for name, token in self.marks.items()}
        config = Qwen3VLConfig(
            vision_config=vision,
            text_config=text,
            image_token_id=tokenizer.convert_tokens_to_ids(self.image),
            video_token_id=ids["video_token"],
            vision_start_token_id=ids["vision_start_token"],
            vision_end_token_id=ids["vision_end_token"],
            tie_word_embeddings=True,
        )
        model = Qwen3VLForConditionalGeneration(config)
        settle_generation(model, tokenizer)
        return model

    def features(self, model: Any, pictures: Tensor, layout: Layout) -> tuple[Tensor, list[Tensor]]:
        """What ``Qwen3VLVisionModel.forward`` does, with all pictures of one size, so that none is split off."""
        visual, count = model.model.visual, len(pictures)
        down, across = layout.grid
        # Patches come block by block. A picture is a film of two equal frames, so that weights of both may be added
        # up; and what is no convolution but in name is not run as one.
        patches = pictures.reshape(count, 3, down, MERGE, PATCH, across, MERGE, PATCH)
        patches = patches.permute(0, 2, 5, 3, 6, 1, 4, 7).reshape(count, -1, 3 * PATCH**2)
        positions, index, weight = _geometry(down, across, pictures.device)
        embed = visual.patch_embed.proj
        states = torch.nn.functional.linear(patches, embed.weight.sum(2).flatten(1), embed.bias)
        table = (visual.pos_embed(index) * weight[..., None].to(states.dtype)).sum(1)
        states = states + table
        rope = tuple(part[:, None].to(states.dtype) for part in visual.rotary_pos_emb(states, positions))
        found = []
        for number, block in enumerate(visual.blocks):
            states = _block(block, states, rope)
            if number in visual.deepstack_visual_indexes:
                merger = visual.deepstack_merger_list[visual.deepstack_visual_indexes.index(number)]
                found.append(merger(states).view(count, layout.tokens, -1))
        return visual.merger(states).view(count, layout.tokens, -1), found


@cache
def _geometry(down: int, across: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Rows and columns of patches [N, 2], entries of the table of positions and their weights, [N, 4] each."""
    config = Qwen3VLConfig(vision_config={"num_position_embeddings": TABLE**2, "spatial_merge_size": MERGE})
    found = Qwen3VL().pictures(config).geometry(down * MERGE, across * MERGE)
    names = ("position_ids", "table_index", "table_weight")
    return tuple(torch.from_numpy(found[name]).to(device) for name in names)  # type: ignore[return-value]
