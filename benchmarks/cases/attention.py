"""Decode attention over packed visual tokens against its rivals (``benchmarks.lib.rivals``), all in one run.

A row of the results is one method on one shape: the time of a call (CUDA-graph replays), what part of the copy
bandwidth it reads the stored cache with (for packed ones: words and levels of the filled groups), and its relative
error against float64 over the same dequantised cache.
"""

from __future__ import annotations

import argparse
from typing import Any

from benchmarks.lib import gpu, rivals

SHAPES = {
    "B64 Hq32 Hkv32 T2304": gpu.DecodeShape(64, 32, 32, 2304, 768),
    "B128 Hq32 Hkv8 T3328": gpu.DecodeShape(128, 32, 8, 3328, 896),
    "B64 Hq28 Hkv4 T8192": gpu.DecodeShape(64, 28, 4, 8192, 1024),
    "B8 Hq32 Hkv32 T2304": gpu.DecodeShape(8, 32, 32, 2304, 768),
    "B1 Hq32 Hkv32 T640": gpu.DecodeShape(1, 32, 32, 640, 640),
}
OURS, AFFINE = "vkvx", "vkvx, affine"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of this benchmark."""
    parser.add_argument("--bits", type=int, nargs="+", default=[1, 2, 4, 8], help="bits of keys and values")
    parser.add_argument(
        "--kernel", choices=("auto", "codes", "few", "planes"), default="auto", help="which kernel (default: auto)"
    )
    parser.add_argument(
        "--correction", choices=("expected", "affine", "none"), default="expected", help="score correction"
    )
    parser.add_argument("--rivals", choices=("all", "fp16"), default="all", help="fp16: only attention on FP16 caches")


def run(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """One row a shape and method."""
    import torch
    from tqdm import tqdm

    kernels, bandwidth = gpu.library(), gpu.copy_bandwidth()
    rows = []
    for name, shape in tqdm(SHAPES.items(), desc="attention", disable=None):
        outcomes, fastest = rivals.sixteen_bits(shape)
        if arguments.rivals == "all":
            outcomes += rivals.eight_bits(shape)
        for bits in arguments.bits:
            call = packed_call(kernels, shape, bits, arguments.correction, arguments.kernel)
            outcomes.append(packed_attention(OURS, call, bits))
            if arguments.rivals == "all":
                outcomes += rivals.packed(call, bits, fastest)
            if bits == 1 and arguments.correction == "expected":
                call = packed_call(kernels, shape, bits, "affine", arguments.kernel)
                outcomes.append(packed_attention(AFFINE, call, bits))
            del call
        rows += [outcome.row(name, bandwidth) for outcome in outcomes]
        torch.cuda.empty_cache()
    return rows


def packed_call(
    kernels: Any, shape: gpu.DecodeShape, bits: int, correction: str, kernel: str = "auto"
) -> gpu.OperatorCall:
    """A decode step of this shape."""
    return gpu.OperatorCall(
        kernels,
        rows=shape.rows,
        query_heads=shape.query_heads,
        kv_heads=shape.kv_heads,
        cached=shape.cached,
        group_size=shape.group_size,
        bits=bits,
        correction=correction,
        kernel=kernel,
    )


def packed_attention(method: str, call: gpu.OperatorCall, bits: int, *, cold: bool = False) -> rivals.RivalTime:
    """The step checked and timed; its output starts as NaN."""
    call.output.fill_(float("nan"))
    expected = call.expected(min(2, call.params.rows))
    return rivals.measure(method, bits, call.cache_bytes, call.attend, expected, cold=cold)


def tables(rows: list[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    """Ours with how many times as long the rivals take; every method's own figures; what has no time, and why."""
    names = list(dict.fromkeys(row["method"] for row in rows if row["us"] is not None))
    others = [name for name in names if name not in (OURS, AFFINE)]
    found = {(row["shape"], row["method"], row["bits"]): row["us"] for row in rows}
    ours = []
    for row in rows:
        if row["method"] != OURS:
            continue
        shape, bits, us = row["shape"], row["bits"], row["us"]
        line = {key: row[key] for key in ("shape", "bits", "us", "% of copy", "error")}
        line["affine us"] = found.get((shape, AFFINE, bits))
        for name in others:
            # A rival reads a cache of the same bits, or one of its own bits whatever ours are.
            rival = found.get((shape, name, bits), found.get((shape, name, _own_bits(rows, name))))
            line[f"x {name}"] = round(rival / us, 2) if rival and us else None
        ours.append(line)
    shown = ("shape", "method", "bits", "us", "% of copy", "error")
    result = {
        "Packed cache, and how many times as long the rivals take": ours,
        "Every method": [{key: row[key] for key in shown} for row in rows if row["us"] is not None],
    }
    failed: dict[tuple[str, str], list[str]] = {}
    for row in rows:
        if row["us"] is None:
            failed.setdefault((row["method"], row["note"]), []).append(row["shape"])
    if failed:
        result["Without a time"] = [
            {"method": method, "why": note, "shapes": ", ".join(dict.fromkeys(shapes))}
            for (method, note), shapes in failed.items()
        ]
    return result


def _own_bits(rows: list[dict[str, Any]], method: str) -> int | None:
    """The bits of a method that has but one."""
    bits = {row["bits"] for row in rows if row["method"] == method}
    return bits.pop() if len(bits) == 1 else None
