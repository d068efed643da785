"""The matrix of families: a checkpoint each, which all tests of ``tests/families`` go through."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from reference import picture

from vkvx.runtime.sessions.processor import PLACEHOLDER
from vkvx.runtime.sessions.session import Session


@dataclass(frozen=True)
class Case:
    """A preset of ``vkvx.models.presets``, and the visual tokens of two pictures, 150 x 90 and 60 x 130 pixels.

    ``text_bits`` are those of its bundle of 1 bit: 8 where layers have windows, share keys, or are of linear attention.
    ``seed`` is that of its weights: one for which no code of the pictures lies on a border within FP32's rounding. In
    groups of 15 tokens a tipped code moves the offsets, and with them later tokens.
    """

    preset: str
    tokens: tuple[int, int]
    text_bits: int = 16
    seed: int = 1


CASES = (
    Case("tiny", (16, 16)),
    Case("tiny-llava-next", (52, 56)),
    Case("tiny-llava-next-mistral", (52, 56)),
    Case("tiny-granite-vision", (52, 56)),
    Case("tiny-llava-onevision", (44, 56)),
    Case("tiny-internvl", (28, 12)),
    Case("tiny-internvl-qwen3", (28, 12)),
    Case("tiny-idefics3", (52, 36)),
    Case("tiny-smolvlm", (52, 36)),
    Case("tiny-qwen2-vl", (15, 10)),
    Case("tiny-qwen2.5-vl", (15, 10)),
    Case("tiny-qwen3-vl", (15, 8), seed=2),
    Case("tiny-qwen3.5", (15, 8), text_bits=8),
    Case("tiny-glm-4.1v", (15, 10)),
    Case("tiny-glm-4.6v", (15, 10)),
    Case("tiny-glm-ocr", (15, 10)),
    Case("tiny-paddleocr-vl", (198, 210)),
    Case("tiny-pixtral", (40, 32)),
    Case("tiny-mistral3", (12, 8)),
    Case("tiny-ministral3", (12, 8)),
    Case("tiny-lightonocr", (8, 8)),
    Case("tiny-gemma3", (16, 16), text_bits=8),
    Case("tiny-paligemma", (16, 16)),
    Case("tiny-paligemma2", (16, 16)),
    Case("tiny-gemma4", (60, 60)),
    Case("tiny-gemma4-e", (60, 60), text_bits=8),
)

WIDE, TALL = picture(150, 90, 1), picture(60, 130, 2)
PROMPTS = (f"First {PLACEHOLDER} then{PLACEHOLDER}\nWhat differs?", f"{PLACEHOLDER}\nWhat is it?")
PICTURES = ([WIDE, TALL], [TALL])
ROOM = {"slots": 2, "visual_tokens": 1024, "text_tokens": 512, "verify": False, "reuse": False}


class Recorded:
    """A session's backend that keeps the logits of each slot."""

    def __init__(self, session: Session) -> None:
        self.logits: dict[int, list[np.ndarray]] = {}
        step = session.backend.step

        def record(call: Any, visual_embeds: Any) -> np.ndarray:
            logits = step(call, visual_embeds)
            for slot, row in zip(call.slot.tolist(), logits, strict=True):
                self.logits.setdefault(slot, []).append(row.copy())
            return logits

        session.backend.step = record  # type: ignore[method-assign]
