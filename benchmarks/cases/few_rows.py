"""Decode steps of few rows with grouped heads: attention, and attention with the append of the step's token.

Caches come from memory, as in a model, where weights and other layers' caches pass through the level-2 cache between
two steps of a layer. The rival is the fastest of torch's backends on an FP16 cache of as many tokens.
"""

from __future__ import annotations

import argparse
from typing import Any

from benchmarks.lib import gpu, rivals

HEADS = {"Hq32 Hkv8": (32, 8), "Hq28 Hkv4": (28, 4), "Hq16 Hkv8": (16, 8)}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of this benchmark."""
    parser.add_argument("--heads", choices=tuple(HEADS), nargs="+", default=list(HEADS), help="query and KV heads")
    parser.add_argument("--bits", type=int, nargs="+", default=[1], help="bits of keys and values")
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8], help="rows")
    parser.add_argument("--tokens", type=int, nargs="+", default=[1024, 4096, 8192], help="visual tokens per row")
    parser.add_argument("--text", type=int, nargs="+", default=[0, 64, 1024], help="text tokens per row")


def run(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """One row a point of the grid, with the `expected` correction and groups of up to 1024 tokens."""
    import torch
    from tqdm import tqdm

    kernels, rows = gpu.library(), []
    grid = [
        (h, b, n, t) for h in arguments.heads for b in arguments.batch for n in arguments.tokens for t in arguments.text
    ]
    for heads, batch, tokens, text in tqdm(grid, desc="few rows", disable=None):
        query_heads, kv_heads = HEADS[heads]
        shape = gpu.DecodeShape(batch, query_heads, kv_heads, tokens + text, 1024)
        outcomes, _ = rivals.sixteen_bits(shape, cold=True)
        best = min((x for x in outcomes if x.us is not None), key=lambda outcome: outcome.us or 0.0, default=None)
        for bits in arguments.bits:
            call = gpu.OperatorCall(
                kernels,
                rows=batch,
                query_heads=query_heads,
                kv_heads=kv_heads,
                cached=tokens,
                text=text,
                group_size=min(1024, tokens),
                bits=bits,
            )
            call.output.fill_(float("nan"))
            expected = call.expected(min(2, batch))
            ours = rivals.measure("vkvx", bits, call.cache_bytes, call.attend, expected, cold=True)
            step = rivals.measure("vkvx step", bits, call.cache_bytes, call.step, expected, cold=True)
            rows.append(
                {
                    "heads": heads,
                    "batch": batch,
                    "tokens": tokens,
                    "text": text,
                    "bits": bits,
                    "us": ours.us and round(ours.us, 2),
                    "with append us": step.us and round(step.us, 2),
                    "FP16 us": best and best.us and round(best.us, 2),
                    "FP16 by": best and best.method,
                    "speed-up": round(best.us / ours.us, 2) if best and best.us and ours.us else None,
                    "error": ours.error and float(f"{ours.error:.1e}"),
                    "note": ours.note or step.note,
                }
            )
            del call
        torch.cuda.empty_cache()
    return rows
