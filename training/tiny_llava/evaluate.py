"""Measure what tiny LLaVA reads right on held-out pages, by greedy generation.

python training/tiny_llava/evaluate.py --pages 1000 --dtype float16
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from transformers import AutoProcessor, LlavaForConditionalGeneration, LlavaProcessor

from vkvx.models.tiny_llava import CHECKPOINT, data

PAIRS = ("second of two", "first of two", "later picture", "earlier picture")
"""Transcriptions with two pictures: both in one turn, or the second one brought by a later turn."""
ALL = (*data.KINDS, *PAIRS, "text")


def text(content: str) -> dict:
    return {"type": "text", "text": content}


def _user(prompt: str, images: int) -> dict:
    return {"role": "user", "content": [{"type": "image"}] * images + [text(prompt)]}


def _cases(kind: str, pages: list[data.Page], rng: np.random.Generator) -> Iterator[tuple[list[dict], list[int], str]]:
    """For each page: the messages, the indices of their pictures, the right answer."""
    for i, page in enumerate(pages):
        other = (i + 1) % len(pages)
        here, there = data.transcription(page.digits), data.transcription(pages[other].digits)
        if kind == "second of two":
            yield [_user("Transcribe the second page.", 2)], [other, i], here
        elif kind == "first of two":
            yield [_user("Transcribe the first page.", 2)], [i, other], here
        elif kind in PAIRS:
            answered = {"role": "assistant", "content": [text(str(pages[other].digits[1, 2]))]}
            before = [_user("What stands at row 2 column 3?", 1), answered]
            if kind == "later picture":
                yield [*before, _user("Transcribe the page.", 1)], [other, i], here
            else:
                yield [*before, _user("Transcribe the first page.", 1)], [other, i], there
        elif kind == "text":
            prompt, answer = data.text_question(rng)
            yield [_user(prompt, 0)], [], answer
        else:
            prompt, answer = data.question(page.digits, page.marks, kind, rng)
            yield [_user(prompt, 1)], [i], answer


@torch.inference_mode()
def answers(
    model: LlavaForConditionalGeneration, processor: LlavaProcessor, prompts: list[str], pictures: list[torch.Tensor]
) -> list[str]:
    """Greedy answers to prompts; `pictures` are preprocessed, [3, 336, 336] each, in the order of the prompts."""
    token, count = processor.image_token, model.config.image_seq_length
    texts = [prompt.replace(token, token * count) for prompt in prompts]
    encoded = processor.tokenizer(texts, padding=True, padding_side="left", return_tensors="pt").to(model.device)
    inputs = {"input_ids": encoded.input_ids, "attention_mask": encoded.attention_mask}
    if pictures:
        inputs["pixel_values"] = torch.stack(pictures).to(model.device, model.dtype)
    generated = model.generate(**inputs, max_new_tokens=48, do_sample=False)
    return processor.batch_decode(generated[:, encoded.input_ids.shape[1] :], skip_special_tokens=True)


def evaluate(
    model: LlavaForConditionalGeneration,
    processor: LlavaProcessor,
    pages: list[data.Page],
    kinds: tuple[str, ...] = ALL,
    batch: int = 64,
) -> dict[str, float]:
    """Share of right answers for each kind of question, and of right digits ("... digits") for each transcription."""
    model.eval()
    pixels = [processor.image_processor(page.image, return_tensors="pt").pixel_values[0] for page in pages]
    result = {}
    for kind in kinds:
        cases, given = list(_cases(kind, pages, np.random.default_rng(7))), []
        for start in range(0, len(cases), batch):
            chosen = cases[start : start + batch]
            prompts = [processor.apply_chat_template(messages, add_generation_prompt=True) for messages, _, _ in chosen]
            given += answers(model, processor, prompts, [pixels[i] for _, images, _ in chosen for i in images])
        truth = [answer for _, _, answer in cases]
        if kind == "transcribe" or kind in PAIRS:
            right = [data.right_digits(a, b) for a, b in zip(given, truth, strict=True)]
            result[f"{kind}, digits"] = float(np.mean(right))
        result[kind] = float(np.mean([a.strip() == b for a, b in zip(given, truth, strict=True)]))
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--checkpoint", type=Path, default=CHECKPOINT, help="folder (default: the bundled one)")
    parser.add_argument("--pages", type=int, default=1000, help="held-out pages: seeds 0, 1, ...")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", default="float16", choices=("float16", "bfloat16", "float32"))
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--kinds", nargs="+", default=ALL, choices=ALL, help="only these kinds of question")
    parser.add_argument("--json", type=Path, help="also write the figures to this file")
    options = parser.parse_args()

    processor = AutoProcessor.from_pretrained(options.checkpoint, backend="pil")
    dtype = getattr(torch, options.dtype)
    model = LlavaForConditionalGeneration.from_pretrained(options.checkpoint, dtype=dtype).to(options.device)
    start = time.monotonic()
    pages = [data.page(seed, "test") for seed in range(options.pages)]
    result = evaluate(model, processor, pages, tuple(options.kinds), options.batch)
    where = torch.cuda.get_device_name() if options.device.startswith("cuda") else options.device
    print(f"{options.pages} held-out pages, {options.dtype}, {where}, {time.monotonic() - start:.0f} s")
    for name, share in result.items():
        print(f"  {name:24s} {share:8.2%}")
    if options.json:
        facts = {"pages": options.pages, "dtype": options.dtype, "device": where, **result}
        options.json.write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
