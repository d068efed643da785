"""Decode attention of layers of the Gemma families: heads of 256 and 512 channels, with a sliding window and without.

The rival of a layer is the fastest of torch's attention backends on an FP16 cache that holds what the layer sees: the
last tokens of its window, or all. Each method is checked against float64 over the numbers that it reads.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from typing import Any

from benchmarks.lib import gpu, rivals


@dataclass(frozen=True)
class Layer:
    """Heads of a layer and its window, 0 for none."""

    query_heads: int
    kv_heads: int
    head_dim: int
    window: int


LAYERS = {
    "Gemma 3 4B": Layer(8, 4, 256, 1024),
    "Gemma 3 4B, full": Layer(8, 4, 256, 0),
    "Gemma 3 27B": Layer(32, 16, 128, 1024),
    "Gemma 3 27B, full": Layer(32, 16, 128, 0),
    "Gemma 4 31B": Layer(32, 16, 256, 1024),
    "Gemma 4 31B, full": Layer(32, 4, 512, 0),
}
GROUP = 256


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of this benchmark."""
    parser.add_argument("--bits", type=int, nargs="+", default=[1, 4], help="bits of keys and values")
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 16], help="rows")
    parser.add_argument("--tokens", type=int, default=8192, help="visual tokens per row, a multiple of 256")


def run(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """One row a layer, batch and number of bits."""
    import torch
    from tqdm import tqdm

    kernels, rows = gpu.library(), []
    for name, layer in tqdm(LAYERS.items(), desc="windows", disable=None):
        for batch in arguments.batch:
            seen = min(layer.window - 1, arguments.tokens) if layer.window else arguments.tokens
            shape = gpu.DecodeShape(batch, layer.query_heads, layer.kv_heads, seen, GROUP, layer.head_dim)
            outcomes, _ = rivals.sixteen_bits(shape)
            best = min((x for x in outcomes if x.us is not None), key=lambda outcome: outcome.us or 0.0, default=None)
            for bits in arguments.bits:
                call = gpu.OperatorCall(
                    kernels,
                    rows=batch,
                    query_heads=layer.query_heads,
                    kv_heads=layer.kv_heads,
                    cached=arguments.tokens,
                    group_size=GROUP,
                    bits=bits,
                    head_dim=layer.head_dim,
                    sliding_window=layer.window,
                )
                call.output.fill_(float("nan"))
                ours = rivals.measure("vkvx", bits, call.cache_bytes, call.attend, call.expected(min(2, batch)))
                rows.append(
                    {
                        "layer": name,
                        "batch": batch,
                        "bits": bits,
                        "window": layer.window,
                        "us": ours.us and round(ours.us, 2),
                        "FP16 us": best and best.us and round(best.us, 2),
                        "FP16 by": best and best.method,
                        "speed-up": round(best.us / ours.us, 2) if best and best.us and ours.us else None,
                        "error": ours.error and float(f"{ours.error:.1e}"),
                        "note": ours.note,
                    }
                )
                del call
            torch.cuda.empty_cache()
    return rows
