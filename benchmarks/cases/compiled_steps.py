"""Decode steps of the torch backend: transformers' modules, fused, and compiled, and what compiling takes.

Random weights in the shapes of known models, 1 bit; every row has a picture and some text in the cache. Times are means
of steps that nobody waits for, with the choice of greedy tokens. "apart" are the modules as they are, "merged" the same
with merged projections, "fused" what a session does by itself, "compiled" what it does with ``compile=True``, "static"
transformers' own decoder, compiled, over a static cache of 16 bits as long as ours. "reading": the weights of a step at
the copy bandwidth that was measured in the same run. "error": logits of FP16 against those of FP32 with the same
weights over the same cache, in a model of few layers, of their range.
"""

from __future__ import annotations

import argparse
import gc
import itertools
import statistics
import time
from collections.abc import Iterator
from typing import Any

import numpy as np

WAYS = ("apart", "merged", "fused", "compiled")
ERROR_LAYERS = 4


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of this benchmark."""
    shapes = ["internvl3.5-2b", "llava-1.5-7b", "internvl3-8b"]
    parser.add_argument("--shapes", nargs="+", default=shapes, help="presets")
    parser.add_argument("--layers", type=int, help="decoder layers in place of a preset's")
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 98], help="rows")
    parser.add_argument("--visual-tokens", type=int, default=3328, help="of each row")
    parser.add_argument("--ways", nargs="+", choices=(*WAYS, "static"), default=[*WAYS, "static"], help="what to time")


def run(arguments: argparse.Namespace) -> Iterator[list[dict[str, Any]]]:
    """Rows so far, each time that there is another. Raises DependencyError without a GPU or libvkvx."""
    import torch

    from benchmarks.lib.gpu import copy_bandwidth, library

    library()
    rows: list[dict[str, Any]] = []
    bandwidth = copy_bandwidth()
    for shape in arguments.shapes:
        errors = {way: _error(shape, way) for way in arguments.ways if way != "static"}
        for batch, way in itertools.product(arguments.batch, arguments.ways):
            given = (shape, arguments.layers, batch, arguments.visual_tokens)
            milliseconds, first, weights = _static(*given) if way == "static" else _step(way, *given)
            rows.append(
                {
                    "shape": shape,
                    "rows": batch,
                    "step": way,
                    "ms": milliseconds and round(milliseconds, 3),
                    "reading ms": round(weights / bandwidth / 1e6, 2),
                    "first steps s": round(first, 1),
                    "error": float(f"{errors[way]:.2g}") if way in errors else None,
                    "device": torch.cuda.get_device_name(),
                }
            )
            print(rows[-1], flush=True)
            yield rows


def _free() -> None:
    import torch

    gc.collect()
    torch.cuda.empty_cache()


def _opened(way: str, shape: str, layers: int | None, batch: int, visual_tokens: int, dtype: str = "float16") -> Any:
    """A backend with the cache filled, for ``way``."""
    import torch

    from benchmarks.cases.decode import random_model
    from benchmarks.cases.session_steps import filled_backend
    from vkvx.runtime.backends.torch import backend

    _free()
    torch.manual_seed(0)
    model = random_model(shape, layers).to(getattr(torch, dtype))
    given = backend.merge_projections, backend.fuse
    if way == "apart":
        backend.merge_projections = lambda _: 0
    if way != "fused":
        backend.fuse = lambda *_: 0
    try:
        opened = filled_backend(model, batch, visual_tokens, dtype)
    finally:
        backend.merge_projections, backend.fuse = given
    if way == "compiled":
        opened.compile()
    return opened


def _step(way: str, shape: str, layers: int | None, batch: int, visual_tokens: int) -> tuple[float, float, int]:
    """Milliseconds of a step, seconds of the first ones, which capture and compile, and bytes of its weights."""
    from benchmarks.cases.session_steps import milliseconds_alone

    opened = _opened(way, shape, layers, batch, visual_tokens)
    decoder = opened._decoder
    weights = _bytes(decoder.text_model, decoder.head)
    begun = time.perf_counter()
    found = milliseconds_alone(opened, {})
    first = time.perf_counter() - begun
    opened.close()
    return found, first, weights


def _bytes(text_model: Any, head: Any) -> int:
    """Bytes of the weights that a step reads: those of the layers and of the head."""
    weights = {*text_model.layers.parameters(), *head.parameters()}
    return sum(weight.numel() * weight.element_size() for weight in weights)


def _static(shape: str, layers: int | None, batch: int, visual_tokens: int) -> tuple[float | None, float, int]:
    """The same of transformers' decoder with a static cache, compiled and captured by torch; no time without room."""
    import torch
    from transformers import StaticCache

    from benchmarks.cases.decode import random_model
    from benchmarks.cases.session_steps import TEXT
    from vkvx.models.family import head_dim
    from vkvx.models.registry import family_of

    _free()
    torch._dynamo.reset()
    model = random_model(shape, layers)
    model.set_attn_implementation({"text_config": "sdpa"})
    config, text, head = model.config.text_config, family_of(model).text_model(model), model.lm_head
    length = visual_tokens + TEXT
    begun = time.perf_counter()
    try:
        with torch.no_grad():
            cache = StaticCache(config=config, max_cache_len=length + 64)
            size = (batch, config.num_key_value_heads, length, head_dim(config))
            for layer in range(config.num_hidden_layers):  # what the cache holds does not matter
                held = torch.randn(size, device="cuda", dtype=torch.float16)
                cache.update(held, held, layer)

            def step(token: Any, position: Any) -> Any:
                hidden = text(input_ids=token, past_key_values=cache, position_ids=position).last_hidden_state
                return head(hidden)[:, -1].argmax(-1)

            compiled = torch.compile(step, mode="reduce-overhead")
            token = torch.full((batch, 1), 9, device="cuda")
            position = torch.full((batch, 1), length, device="cuda")
            times = []
            for _ in range(24):
                torch.cuda.synchronize()
                started = time.perf_counter()
                compiled(token, position).cpu()
                times.append(time.perf_counter() - started)
        return 1000 * statistics.median(times[8:]), sum(times[:8]), _bytes(text, head)
    except torch.OutOfMemoryError:
        return None, time.perf_counter() - begun, _bytes(text, head)


def _error(shape: str, way: str) -> float:
    """How far FP16's logits of steps are from those of FP32 over the same cache, of their range, in few layers."""
    from benchmarks.cases.session_steps import decode_call

    opened = _opened(way, shape, ERROR_LAYERS, 1, 640)
    exact = _opened("apart", shape, ERROR_LAYERS, 1, 640, "float32")
    found = []
    for token in (10, 200, 3000):
        exact.cache.load(opened.cache)  # codes of either's own prefill could fall on other sides of a border
        ours, expected = (side.step(decode_call(side, [token]), None) for side in (opened, exact))
        found.append(float(np.abs(ours - expected).max() / np.ptp(expected)))
    opened.close()
    exact.close()
    return max(found)
