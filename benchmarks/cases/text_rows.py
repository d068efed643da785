"""Decode attention and append over text rows of 16 and of 8 bits, beside packed pictures, on a GPU.

Caches come from memory, as in a model. Text of 8 bits is less to read, but its codes have to become numbers.
"""

from __future__ import annotations

import argparse
from typing import Any

from benchmarks.lib import gpu

HEADS = ((32, 32), (32, 8), (28, 4))


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of this benchmark."""
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8, 64], help="rows")
    parser.add_argument("--visual", type=int, default=1024, help="visual tokens per row, at 1 bit")
    parser.add_argument("--text", type=int, nargs="+", default=[64, 1024], help="text tokens per row")


def run(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """One row a point of the grid: microseconds, the relative error, and bytes of text a token, of all KV heads."""
    import torch

    from vkvx.format import auto_group_size

    kernels, rows = gpu.library(), []
    size = auto_group_size(arguments.visual)
    for query_heads, kv_heads in HEADS:
        for batch in arguments.batch:
            for text in arguments.text:
                row: dict[str, Any] = {"heads": f"{query_heads}/{kv_heads}", "batch": batch, "text tokens": text}
                for bits in (16, 8):
                    call = gpu.OperatorCall(
                        kernels,
                        rows=batch,
                        query_heads=query_heads,
                        kv_heads=kv_heads,
                        cached=arguments.visual,
                        group_size=size,
                        text=text,
                        text_bits=bits,
                    )
                    checked = min(batch, 2)
                    error = gpu.relative_error(call.attend()[:checked], call.expected(checked))
                    key = call.tensors["text_key"]
                    row |= {
                        f"{bits} bits us": round(gpu.microseconds(call.attend, cold=True), 2),
                        f"{bits} bits append us": round(gpu.microseconds(call.append), 2),
                        f"{bits} bits bytes": 2 * kv_heads * key[0, 0, 0].numel() * key.element_size(),
                        f"{bits} bits error": float(f"{error:.1e}"),
                    }
                rows.append(row)
                torch.cuda.empty_cache()
    return rows
