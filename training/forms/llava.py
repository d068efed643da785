"""tiny-llava: LLaVA-1.5's form. Every 336 x 336 picture becomes 24 x 24 patches of 14 pixels, 576 visual tokens."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import Tensor
from transformers import (
    CLIPImageProcessorPil,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
)

from training.forms.base import Form, Layout, cells_of, settle_generation
from vkvx.models.llava import projected_features
from vkvx.models.processor_files import ProcessorFiles
from vkvx.models.tiny_llava import CHECKPOINT, data

SIDE = data.SIZE // 14


class TinyLlava(Form):
    """``LlavaForConditionalGeneration`` with a CLIP tower and a Llama decoder."""

    name = "tiny-llava"
    layouts = (Layout(data.ROWS, data.COLUMNS, (data.SIZE, data.SIZE), tuple(cells_of(SIDE, SIDE, 4, 6))),)
    kinds = dict(zip(data.KINDS, (0.34, 0.16, 0.14, 0.12, 0.06, 0.09, 0.09), strict=True))
    pad, bos, eos, image = "<pad>", "<s>", "</s>", "<image>"
    marks: dict[str, str] = {}
    lead, after = " ", ""

    @property
    def template(self) -> str:
        """That of the checkpoint in the package."""
        return (CHECKPOINT / "chat_template.jinja").read_text(encoding="utf-8")

    def turn(self, prompt: str, images: int) -> str:
        """As in LLaVA-1.5."""
        return f"USER: {f'{self.image}{chr(10)}' * images}{prompt} ASSISTANT:"

    def processor(self, tokenizer: PreTrainedTokenizerFast) -> ProcessorFiles:
        """CLIP's image processor, the pillow one."""
        images = CLIPImageProcessorPil(
            size={"shortest_edge": data.SIZE},
            crop_size={"height": data.SIZE, "width": data.SIZE},
            image_mean=list(self.mean),
            image_std=list(self.std),
        )
        return ProcessorFiles(tokenizer, images, self.template)

    def save_processor(self, tokenizer: PreTrainedTokenizerFast, directory: Path) -> None:
        """In one file with the settings of LLaVA's own processor."""
        files = self.processor(tokenizer)
        LlavaProcessor(
            image_processor=files.images,
            tokenizer=tokenizer,
            patch_size=14,
            vision_feature_select_strategy="default",
            num_additional_image_tokens=1,  # CLIP's class token, which the strategy "default" leaves out
            chat_template=files.chat_template,
        ).save_pretrained(directory)

    def build(self, tokenizer: PreTrainedTokenizerFast) -> LlavaForConditionalGeneration:
        """5.5 million parameters."""
        vision = CLIPVisionConfig(
            hidden_size=192,
            intermediate_size=768,
            num_hidden_layers=6,  # the last is not used: features come from the layer before, as in LLaVA-1.5
            num_attention_heads=3,
            image_size=data.SIZE,
            patch_size=14,
            projection_dim=192,
        )
        text = LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=256,
            intermediate_size=512,
            num_hidden_layers=4,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=64,
            max_position_embeddings=4096,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
            tie_word_embeddings=True,
        )
        config = LlavaConfig(
            vision_config=vision,
            text_config=text,
            image_token_id=tokenizer.convert_tokens_to_ids(self.image),
            image_seq_length=SIDE**2,
            vision_feature_layer=-2,
            vision_feature_select_strategy="default",
            projector_hidden_act="gelu",
            tie_word_embeddings=True,
        )
        model = LlavaForConditionalGeneration(config)
        settle_generation(model, tokenizer)
        return model

    def features(self, model: Any, pictures: Tensor, layout: Layout) -> tuple[Tensor, list[Tensor]]:
        """As the family does it."""
        return projected_features(model, pictures), []
