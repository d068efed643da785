"""Decode steps of the torch backend with projections apart, merged, and compiled, and what compiling takes.

Random weights in the shapes of known models, 1 bit; every row has a picture and some text in the cache. Times are means
of steps that nobody waits for, with the choice of greedy tokens. "error": logits of FP16 against those of FP32 with the
same weights and the same number of layers, in a model of few layers, of their range.
"""

from __future__ import annotations

import argparse
import gc
import time
from typing import Any

import numpy as np

WAYS = ("apart", "merged", "compiled")
ERROR_LAYERS = 4


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of this benchmark."""
    parser.add_argument("--shapes", nargs="+", default=["llava-1.5-7b", "internvl3-8b"], help="presets")
    parser.add_argument("--layers", type=int, help="decoder layers in place of a preset's")
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 98], help="rows")
    parser.add_argument("--visual-tokens", type=int, default=3328, help="of each row")


def run(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """Rows of the table."""
    import torch

    rows = []
    for shape in arguments.shapes:
        errors = {way: _logits(shape, way, "float16") for way in WAYS}
        exact = _logits(shape, "apart", "float32")
        for batch in arguments.batch:
            for way in WAYS:
                milliseconds, first = _step(shape, arguments.layers, way, batch, arguments.visual_tokens)
                off = np.abs(errors[way] - exact).max() / np.ptp(exact)
                rows.append(
                    {
                        "shape": shape,
                        "rows": batch,
                        "projections": way,
                        "step ms": round(milliseconds, 3),
                        "first steps s": round(first, 1),
                        "error": float(f"{off:.2g}"),
                        "device": torch.cuda.get_device_name(),
                    }
                )
    return rows


def _opened(shape: str, layers: int | None, way: str, batch: int, visual_tokens: int, dtype: str = "float16") -> Any:
    """A backend with the cache filled, for ``way``."""
    import torch

    from benchmarks.cases.decode import random_model
    from benchmarks.cases.session_steps import filled_backend
    from vkvx.runtime.backends.torch import backend

    gc.collect()
    torch.cuda.empty_cache()
    torch.manual_seed(0)
    model = random_model(shape, layers).to(getattr(torch, dtype))
    merge = backend.merge_projections
    if way == "apart":
        backend.merge_projections = lambda _: 0
    try:
        opened = filled_backend(model, batch, visual_tokens, dtype)
    finally:
        backend.merge_projections = merge
    if way == "compiled":
        opened.compile()
    return opened


def _step(shape: str, layers: int | None, way: str, batch: int, visual_tokens: int) -> tuple[float, float]:
    """Milliseconds of a step, and seconds of the first ones, which capture and compile."""
    from benchmarks.cases.session_steps import milliseconds_alone

    opened = _opened(shape, layers, way, batch, visual_tokens)
    begun = time.perf_counter()
    found = milliseconds_alone(opened, {})
    first = time.perf_counter() - begun
    opened.close()
    return found, first


def _logits(shape: str, way: str, dtype: str) -> np.ndarray:
    """Logits [steps, V] of one row in a model of few layers."""
    from benchmarks.cases.session_steps import decode_call

    opened = _opened(shape, ERROR_LAYERS, way, 1, 640, dtype)
    logits = [opened.step(decode_call(opened, [token]), None)[0] for token in (10, 200, 3000)]
    opened.close()
    return np.stack(logits)
