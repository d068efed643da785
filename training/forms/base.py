"""What the forms have in common: how pages are shown, how conversations read, and the tokenizer."""

from __future__ import annotations

import itertools
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from vkvx.models.processor_files import ProcessorFiles
from vkvx.models.tiny_llava import data

CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)


@dataclass(frozen=True)
class Layout:
    """A way to show a page: ``rows`` x ``columns`` digits; ``cells`` [T] says over which of them each token lies.

    ``share`` of the steps have it. ``size`` is that of the picture in pixels, height and width, ``grid`` in tokens
    where tokens form one.
    """

    rows: int
    columns: int
    size: tuple[int, int]
    cells: tuple[int, ...]
    share: float = 1.0
    grid: tuple[int, int] = (0, 0)

    @property
    def tokens(self) -> int:
        """Visual tokens of a page."""
        return len(self.cells)


def cells_of(height: int, width: int, rows: int, columns: int, first: int = 0, stride: int = data.COLUMNS) -> list[int]:
    """The cell under the middle of each of ``height`` x ``width`` tokens that show ``rows`` x ``columns`` cells.

    Cells are counted along rows of ``stride``, the top left one is ``first``.
    """
    down = [int((y + 0.5) * rows / height) for y in range(height)]
    across = [int((x + 0.5) * columns / width) for x in range(width)]
    return [first + r * stride + c for r in down for c in across]


class Form(ABC):
    """A kind of model: its classes are those of transformers, its parts are run here for many pages at once."""

    name: str
    layouts: tuple[Layout, ...]
    kinds: dict[str, float]
    """Kinds of question and how often they are asked."""
    pad: str
    bos: str | None
    eos: str
    image: str
    marks: dict[str, str]
    """Further special tokens, by their names in the tokenizer."""
    mean = CLIP_MEAN
    std = CLIP_STD
    template: str
    lead: str
    after: str
    """Stand before each answer, and behind its end."""
    wide_positions = False
    """Whether positions have a time, a row and a column."""

    @abstractmethod
    def turn(self, prompt: str, images: int) -> str:
        """A user's turn up to where the assistant answers: what the chat template gives, an image token a picture."""

    @abstractmethod
    def processor(self, tokenizer: PreTrainedTokenizerFast) -> ProcessorFiles:
        """Tokenizer, image processor and chat template."""

    def save_processor(self, tokenizer: PreTrainedTokenizerFast, directory: Path) -> None:
        """Its files."""
        self.processor(tokenizer).save(directory)

    @abstractmethod
    def build(self, tokenizer: PreTrainedTokenizerFast) -> Any:
        """A freshly initialised model, float32. The seed is torch's global one."""

    @abstractmethod
    def features(self, model: Any, pictures: Tensor, layout: Layout) -> tuple[Tensor, list[Tensor]]:
        """Visual tokens [P, T, hidden] of normalised pictures [P, 3, H, W], and what decoder layers add to them."""

    def resize(self, pages: Tensor, layout: Layout) -> Tensor:
        """Pages uint8 [P, 3, H, W] in the size of the layout."""
        if pages.shape[-2:] == layout.size:
            return pages
        scaled = torch.nn.functional.interpolate(
            pages.float(), layout.size, mode="bicubic", antialias=True, align_corners=False
        )
        return scaled.round().clamp(0, 255).byte()

    def tokenizer(self) -> PreTrainedTokenizerFast:
        """A byte-level tokenizer: it represents any text; each digit is one token, so is each word of the questions.

        The few merges are learnt from the questions themselves, always the same ones.
        """
        special = list(dict.fromkeys(token for token in (self.pad, self.bos, self.eos, self.image) if token))
        special += [token for token in self.marks.values() if token not in special]
        tokenizer = Tokenizer(models.BPE())
        # Digits and line ends never merge with anything: an answer of n digits is always n tokens.
        alone = pre_tokenizers.Split(Regex(r"[0-9]|\n"), behavior="isolated")
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence([alone, pre_tokenizers.ByteLevel(add_prefix_space=False)])
        tokenizer.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(
            vocab_size=512,
            min_frequency=1,
            special_tokens=[AddedToken(token, special=True, normalized=False) for token in special],
            initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
            show_progress=False,
        )
        tokenizer.train_from_iterator(self._texts(), trainer)
        extra = {"image_token": self.image, **self.marks}
        if self.bos:
            bos = tokenizer.token_to_id(self.bos)
            tokenizer.post_processor = processors.TemplateProcessing(
                single=f"{self.bos} $A", pair=f"{self.bos} $A {self.bos} $B", special_tokens=[(self.bos, bos)]
            )
            extra["bos_token"] = self.bos
        return PreTrainedTokenizerFast(
            tokenizer_object=tokenizer,
            eos_token=self.eos,
            pad_token=self.pad,
            model_max_length=4096,
            padding_side="left",
            **({"bos_token": extra.pop("bos_token")} if self.bos else {}),
            extra_special_tokens=extra,
        )

    def _texts(self) -> list[str]:
        """Every wording that the data set uses."""
        rng = np.random.default_rng(0)
        pages = [data.page(seed, "train") for seed in range(2)]
        texts = [self.turn(text, 0) + " " + answer for text, answer in (data.text_question(rng) for _ in range(200))]
        names = ("page", "first page", "second page")
        for name, kind, page, _ in itertools.product(names, data.KINDS, pages, range(40)):
            prompt, answer = data.question(page.digits, page.marks, kind, rng, name)
            texts.append(self.turn(prompt, 0) + " " + answer)
        words = itertools.product(data.COLOURS, data.SHAPES)
        return texts + [f" {colour} {shape} none {colour[1:]}" for colour, shape in words]


def settle_generation(model: Any, tokenizer: PreTrainedTokenizerFast) -> None:
    """Greedy answers that end with the tokenizer's end of text."""
    generation = model.generation_config
    generation.bos_token_id, generation.eos_token_id = tokenizer.bos_token_id, tokenizer.eos_token_id
    generation.pad_token_id, generation.do_sample = tokenizer.pad_token_id, False


def decode(
    core: Any, embeds: Tensor, positions: Tensor, added: Sequence[Tensor], places: Tensor
) -> tuple[Tensor, Tensor]:
    """States [rows, length, hidden] behind the last layer of a decoder, and those behind its second one.

    ``added`` is what the first layers add at ``places``, the numbers of the visual tokens in the flattened rows.
    """
    rope = core.rotary_emb(embeds, positions)
    states = middle = embeds
    for number, layer in enumerate(core.layers):
        states = layer(states, attention_mask=None, position_embeddings=rope)
        if number < len(added):
            flat = states.flatten(0, 1).index_add(0, places, added[number].flatten(0, -2).to(states.dtype))
            states = flat.view_as(states)
        if number == 1:
            middle = states
    return core.norm(states), middle
