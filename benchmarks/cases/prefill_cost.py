"""What quantising a prompt's pictures adds to its prefill on a GPU: whole models, one row, over 16 bits.

Random weights in the shape of a known model, the metrics of ``shaped`` from these weights. A prompt's own tokens attend
to each other as they are, so logits have to be those of 16 bits but for the order of sums: "off" is their largest
difference as a share of the range. "append ms" is what the kernels of append take, by torch's profiler; the rest of the
call is the same for all. Times are medians of eager calls, from inputs in main memory to logits there.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Iterator
from typing import Any

import numpy as np

PROMPTS = {"internvl3-8b": ((3328,), 100), "llava-1.5-7b": ((576,) * 4, 100)}
"""Visual tokens of each picture, and text tokens."""
CACHES = ((16, None), (1, "lloyd"), (1, "shaped"), (2, "shaped"), (4, "shaped"))
KERNELS = ("append_rows_kernel", "append_code_rows_kernel", "rank_tokens_kernel", "quantize_", "shape_")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of this benchmark."""
    parser.add_argument("--shapes", nargs="+", default=list(PROMPTS), choices=PROMPTS, help="default: all")
    parser.add_argument("--layers", type=int, help="decoder layers in place of the preset's")
    parser.add_argument("--repeats", type=int, default=9, help="timed calls (default 9)")


def run(arguments: argparse.Namespace) -> Iterator[list[dict[str, Any]]]:
    """Rows of the table, all of them so far after each."""
    import torch

    from benchmarks.cases.decode import random_model
    from vkvx.models.graph.metric import model_metrics
    from vkvx.models.registry import family_of

    rows: list[dict[str, Any]] = []
    for shape in arguments.shapes:
        model = random_model(shape, arguments.layers)
        family = family_of(model)
        found = model_metrics(family, model, family.info(model.config, "float16"))
        metrics = tuple(zip(found.key, found.value, strict=True))
        first: tuple[float, np.ndarray] | None = None
        for bits, quantizer in CACHES:
            prefill = _Prefill(model, shape, bits, quantizer, metrics)
            logits = prefill()
            prefill()
            milliseconds = statistics.median(prefill.milliseconds() for _ in range(arguments.repeats))
            first = first or (milliseconds, logits)
            rows.append(
                {
                    "shape": shape,
                    "pictures": " + ".join(map(str, PROMPTS[shape][0])),
                    "text": PROMPTS[shape][1],
                    "bits": bits,
                    "quantizer": quantizer or "",
                    "ms": round(milliseconds, 2),
                    "over 16 bits": round(milliseconds / first[0], 3),
                    "append ms": round(prefill.append_milliseconds(), 2),
                    "off": f"{np.abs(logits - first[1]).max() / np.ptp(first[1]):.1g}",
                    "device": torch.cuda.get_device_name(),
                }
            )
            prefill.backend.close()
            del prefill
            torch.cuda.empty_cache()
            yield rows
        del model, found, metrics
        torch.cuda.empty_cache()


class _Prefill:
    """One row's first call, again and again."""

    def __init__(self, model: Any, shape: str, bits: int, quantizer: str | None, metrics: tuple[Any, ...]) -> None:
        from vkvx import ExportOptions
        from vkvx.manifest import Graph, Manifest
        from vkvx.models.registry import family_of
        from vkvx.runtime.backends.torch.backend import TorchBackend

        family = family_of(model)
        info = family.info(model.config, "float16")
        quantization = ExportOptions(bits=bits, quantizer=quantizer).resolve(info.cached_layers, info.typical_tokens)
        manifest = Manifest("", 1, info, quantization, {"vision": Graph("", 18, (), ())}, ".", {})
        self.size, self.image = quantization.group_size, info.image_token_id
        self.pictures, text = PROMPTS[shape]
        room = sum(-(-tokens // self.size) * self.size for tokens in self.pictures) if bits < 16 else 0
        self.backend = TorchBackend(
            model,
            family,
            manifest,
            metrics if quantizer == "shaped" else (),
            slots=1,
            visual_tokens=room,
            text_tokens=text + (sum(self.pictures) if bits == 16 else 0),
        )
        rng = np.random.default_rng(0)
        parts = [np.full(tokens, self.image) for tokens in self.pictures]
        self.ids = np.concatenate([*parts, rng.integers(4, 1000, text)]).astype(np.int32)
        self.embeds = rng.standard_normal((sum(self.pictures), info.embed_width), np.float32).astype("float16")

    def __call__(self) -> np.ndarray:
        from vkvx.runtime.calls import build_call, place_embeds

        cache = self.backend.cache
        slot = cache.acquire()
        row = cache.row(slot, self.ids, self.pictures)
        call = build_call([row], group_size=self.size, image_token_id=self.image)
        logits = self.backend.step(call, place_embeds(call, self.embeds))[0]
        cache.release(slot)
        return logits  # type: ignore[no-any-return]

    def milliseconds(self) -> float:
        start = time.perf_counter()
        self()
        return 1e3 * (time.perf_counter() - start)

    def append_milliseconds(self) -> float:
        """Of the kernels of append in one call."""
        from torch.profiler import ProfilerActivity, profile

        with profile(activities=[ProfilerActivity.CUDA]) as recorded:
            self()
        events = recorded.key_averages()
        return sum(e.device_time_total for e in events if any(name in e.key for name in KERNELS)) / 1e3
