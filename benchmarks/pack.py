"""Quantise-and-pack of new visual tokens: time, and how fast it reads their keys and values."""

from __future__ import annotations

import argparse
from typing import Any

from benchmarks import gpu


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of this benchmark."""
    parser.add_argument("--bits", type=int, nargs="+", default=[1, 2, 4, 8], help="bits of keys and values")
    parser.add_argument("--rows", type=int, default=32, help="sequences (default 32)")


def run(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """Rows of the table: 3328 tokens a row in groups of 896, 8 KV heads of 128 channels."""
    import torch

    kernels, bandwidth = gpu.library(), gpu.copy_bandwidth()
    rows = []
    for quantizer in ("minmax", "quantile", "shrink", "lloyd"):
        for bits in arguments.bits:
            call = gpu.Call(
                kernels,
                rows=arguments.rows,
                query_heads=8,
                kv_heads=8,
                positions=3328,
                visual=3328,
                group_size=896,
                bits=bits,
                quantizer=quantizer,
            )
            time = gpu.microseconds(call.append, inner=2, repeats=8)
            read = 2 * call.tensors["key"].numel() * 2
            rows.append(
                {
                    "quantizer": quantizer,
                    "bits": bits,
                    "us": round(time, 1),
                    "% of copy": round(100 * read / time / 1e3 / bandwidth, 1),
                    "copy GB/s": round(bandwidth),
                    "device": torch.cuda.get_device_name(),
                }
            )
            del call
            torch.cuda.empty_cache()
    return rows
