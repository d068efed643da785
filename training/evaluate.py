"""Measure what a trained model reads right on held-out pages, by greedy generation at 16 bits.

    python -m training.evaluate tiny-llava --pages 1000

`vkvx eval` measures what quantised caches cost.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch

from vkvx.evaluation.tasks import Sample
from vkvx.evaluation.torch_runner import TorchRunner
from vkvx.models.registry import resolve
from vkvx.models.tiny_llava import data

PAIRS = ("first of two", "second of two")
"""Transcriptions with two whole pages in the prompt."""
KINDS = (*data.KINDS, *PAIRS, "parts")
"""All kinds of question; "parts" are transcriptions of parts of pages, which tiny-llava was not trained for."""


def samples(kind: str, count: int) -> Iterator[Sample]:
    """A question of a kind about each of so many held-out pages."""
    rng = np.random.default_rng(7)
    for index in range(count):
        if kind == "parts":
            size = data.PARTS[index % len(data.PARTS)]
            part = data.crop(data.page(index, "test"), *size)
            yield Sample(index, "Transcribe the page.", (part.image,), (data.transcription(part.digits),))
            continue
        page = data.page(index, "test")
        if kind in PAIRS:
            other = data.page((index + 1) % count, "test").image
            pictures = (page.image, other) if kind == PAIRS[0] else (other, page.image)
            prompt = f"Transcribe the {kind.split()[0]} page."
            yield Sample(index, prompt, pictures, (data.transcription(page.digits),))
        else:
            prompt, answer = data.question(page.digits, page.marks, kind, rng)
            yield Sample(index, prompt, (page.image,), (answer,))


def evaluate(runner: TorchRunner, kinds: tuple[str, ...], count: int, batch: int) -> dict[str, float]:
    """Share of right answers for each kind of question, and of right digits ("..., digits") for each transcription."""
    result = {}
    for kind in kinds:
        asked, given = list(samples(kind, count)), []
        for start in range(0, count, batch):
            chosen = asked[start : start + batch]
            given += [runner.text(tokens) for tokens in runner.start(chosen, [None] * len(chosen)).answers]
        pairs = list(zip(given, (sample.answers[0] for sample in asked), strict=True))
        if kind in ("transcribe", "parts", *PAIRS):
            result[f"{kind}, digits"] = float(np.mean([data.right_digits(*pair) for pair in pairs]))
        result[kind] = float(np.mean([text.strip() == answer for text, answer in pairs]))
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("checkpoint", help="an alias or a folder")
    parser.add_argument("--pages", type=int, default=1000, help="held-out pages: seeds 0, 1, ...")
    parser.add_argument("--device", default="auto", choices=("auto", "cpu", "cuda"))
    parser.add_argument("--dtype", default="float16", choices=("float16", "bfloat16", "float32"))
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--kinds", nargs="+", default=KINDS, choices=KINDS, help="only these kinds of question")
    parser.add_argument("--json", type=Path, help="also write the figures to this file")
    options = parser.parse_args()

    start = time.monotonic()
    runner = TorchRunner(resolve(options.checkpoint), options.device, options.dtype, 48)
    result = evaluate(runner, tuple(options.kinds), options.pages, options.batch)
    where = torch.cuda.get_device_name() if runner.device == "cuda" else runner.device
    print(f"{options.pages} held-out pages, {options.dtype}, {where}, {time.monotonic() - start:.0f} s")
    for name, share in result.items():
        print(f"  {name:24s} {share:8.2%}")
    if options.json:
        facts = {"pages": options.pages, "dtype": options.dtype, "device": where, **result}
        options.json.write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
