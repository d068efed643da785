"""From how many visual tokens on a decode step over the packed cache is faster than torch's fastest on FP16.

By default caches come from memory, as in a model, where weights and the caches of other layers pass through the level-2
cache between two steps of a layer; ``--warm`` repeats a step on what the one before left there.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from typing import Any

from benchmarks.cases import attention
from benchmarks.lib import gpu, rivals

HEADS = {"Hq32 Hkv32": (32, 32), "Hq32 Hkv8": (32, 8)}
_ORDER = ("heads", "bits", "batch")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of this benchmark."""
    parser.add_argument("--bits", type=int, nargs="+", default=[1, 2, 4, 8], help="bits of keys and values")
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 2, 4, 8, 16, 32, 64], help="rows")
    parser.add_argument("--warm", action="store_true", help="leave caches in the level-2 cache where they fit")
    tokens = [256, 512, 1024, 2048, 4096, 8192]
    parser.add_argument("--tokens", type=int, nargs="+", default=tokens, help="visual tokens per row, multiples of 128")


def run(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """One row a point of the grid, with the `expected` correction."""
    import torch
    from tqdm import tqdm

    from vkvx.format import auto_group_size

    kernels, cold, rows = gpu.library(), not arguments.warm, []
    grid = [(h, b, t) for h in HEADS for b in arguments.batch for t in arguments.tokens]
    for heads, batch, tokens in tqdm(grid, desc="break-even", disable=None):
        shape = gpu.DecodeShape(batch, *HEADS[heads], tokens, auto_group_size(tokens))
        outcomes, _ = rivals.sixteen_bits(shape, cold=cold)
        best = min((x for x in outcomes if x.us is not None), key=lambda outcome: outcome.us or 0.0)
        for bits in arguments.bits:
            call = attention.packed_call(kernels, shape, bits, "expected")
            ours = attention.packed_attention(attention.OURS, call, bits, cold=cold)
            rows.append(
                {
                    "heads": heads,
                    "bits": bits,
                    "batch": batch,
                    "tokens": tokens,
                    "us": ours.us and round(ours.us, 2),
                    "FP16 us": best.us and round(best.us, 2),
                    "FP16 by": best.method,
                    "speed-up": round(best.us / ours.us, 2) if best.us and ours.us else None,
                    "error": ours.error and float(f"{ours.error:.1e}"),
                }
            )
        torch.cuda.empty_cache()
    return rows


def break_even(speed_ups: Mapping[int, float | None]) -> int | None:
    """The fewest measured tokens from which on every measured number of tokens has a speed-up over 1, if any."""
    found = None
    for tokens in sorted(speed_ups, reverse=True):
        if (speed_ups[tokens] or 0.0) <= 1:
            break
        found = tokens
    return found


def speed_ups(rows: list[dict[str, Any]]) -> dict[tuple[str, int, int], dict[int, float | None]]:
    """(heads, bits, batch), in that order, to the speed-up at each number of tokens."""
    found: dict[tuple[str, int, int], dict[int, float | None]] = {}
    for row in sorted(
        rows, key=lambda row: (list(HEADS).index(row["heads"]), row["bits"], row["batch"], row["tokens"])
    ):
        found.setdefault((row["heads"], row["bits"], row["batch"]), {})[row["tokens"]] = row["speed-up"]
    return found


def tables(rows: list[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    """Break-even by batch, and all speed-ups."""
    found, batches = speed_ups(rows), sorted({row["batch"] for row in rows})
    measured = sorted({row["tokens"] for row in rows})

    def text(points: Mapping[int, float | None]) -> str:
        tokens = break_even(points)
        if tokens is None:
            return f"over {measured[-1]}"
        return f"≤ {tokens}" if tokens == measured[0] else str(tokens)

    return {
        "Visual tokens from which on the packed cache is faster": [
            {"heads": heads, "bits": bits, **{f"B{batch}": text(found[heads, bits, batch]) for batch in batches}}
            for heads, bits in dict.fromkeys(key[:2] for key in found)
        ],
        "Times as fast as the fastest FP16 attention, by visual tokens": [
            {**dict(zip(_ORDER, key, strict=True)), **{str(tokens): points[tokens] for tokens in measured}}
            for key, points in found.items()
        ],
    }
