"""Time to the first token of two questions about a picture on a GPU, where the second goes on from the first's slot.

Random weights in the shape of a known model. Each question has text of its own behind the same picture, which is the
same for all: what slots keep is dropped before each first question. At 1 bit prompts are cut behind their picture.
Answers to second questions are compared with those of the same session without reuse; as these feed the question by
products of other shapes, logits differ by rounding, so that equal tokens are counted. Times are medians, vision tower
included.
"""

from __future__ import annotations

import argparse
import statistics
import time
from typing import Any

TOKENS = 8


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of this benchmark."""
    parser.add_argument("--shape", default="llava-1.5-7b", help="preset to give random weights")
    parser.add_argument("--layers", type=int, help="decoder layers in place of the preset's")
    parser.add_argument("--visual-tokens", type=int, default=576, help="of the picture")
    parser.add_argument("--bits", nargs="+", default=["1", "16"])
    parser.add_argument("--prefill-chunk", type=int, default=0, help="capture prefills of so many tokens (0: do not)")
    parser.add_argument("--repeats", type=int, default=9)


def run(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """Rows of the table."""
    import torch

    from benchmarks.cases.decode import random_model
    from benchmarks.lib.serving import SIXTEEN, Model, Setting, Workload
    from vkvx.runtime.sessions.reuse import KeptSequences

    workload = Workload(arguments.shape, 1, arguments.visual_tokens, answer=TOKENS)
    model = Model(workload, random_model(arguments.shape, arguments.layers))
    rows = []
    for setting in map(Setting.parse, arguments.bits):
        session = model.open(setting, slots=3, chunk=arguments.prefill_chunk)
        session.cut_after_pictures = setting.bits != SIXTEEN
        firsts, seconds, equal = list[float](), list[float](), 0
        for repeat in range(arguments.repeats + 2):  # two warm up
            asked = [str(2 * repeat), str(2 * repeat + 1)]
            session.kept = None
            alone = _ask(session, asked[1])[1]
            session.kept = KeptSequences(session.backend)
            first, _ = _ask(session, asked[0])
            second, answer = _ask(session, asked[1])
            if answer.reused_tokens < arguments.visual_tokens:
                raise RuntimeError(f"only {answer.reused_tokens} tokens were reused")
            if repeat >= 2:
                firsts.append(first)
                seconds.append(second)
                equal += sum(a == b for a, b in zip(alone.token_ids, answer.token_ids, strict=True))
            for slot in session.backend.cache.kept_slots:
                session.backend.cache.resume(slot)
                session.backend.cache.release(slot)
        first, second = statistics.median(firsts), statistics.median(seconds)
        rows.append(
            {
                "shape": arguments.shape,
                "setting": str(setting),
                "prompt": workload.prompt,
                "reused": answer.reused_tokens,
                "first question ms": round(1000 * first, 2),
                "second ms": round(1000 * second, 2),
                "ratio": round(second / first, 3),
                "equal tokens": f"{equal} of {TOKENS * arguments.repeats}",
                "device": torch.cuda.get_device_name(),
            }
        )
        print(rows[-1], flush=True)
        session.backend.close()
    return rows


def _ask(session: Any, prompt: str) -> tuple[float, Any]:
    """Seconds to the first token of an answer, and the answer."""
    begun, first, found = time.perf_counter(), 0.0, None
    for chunk in session.stream(prompt, max_new_tokens=TOKENS, ignore_eos=True, temperature=0.0):
        first = first or time.perf_counter() - begun
        found = chunk.generation
    return first, found
