"""Decode attention over packed visual tokens against torch's attention over 16-bit ones, in one run.

Each row of the table has the time of a call (CUDA-graph replays), what part of the copy bandwidth it reads the words
and levels of the filled groups with, how many times faster it is than torch's attention backends on an FP16 cache, and
its relative error against float64 over the same dequantised cache.
"""

from __future__ import annotations

import argparse
import math
from typing import Any

from benchmarks import gpu

SHAPES = {
    "B64 Hq32 Hkv32 T2304": (64, 32, 32, 2304, 768),
    "B128 Hq32 Hkv8 T3328": (128, 32, 8, 3328, 896),
    "B64 Hq28 Hkv4 T8192": (64, 28, 4, 8192, 1024),
    "B8 Hq32 Hkv32 T2304": (8, 32, 32, 2304, 768),
    "B1 Hq32 Hkv32 T640": (1, 32, 32, 640, 640),
}
"""Rows, query heads, KV heads, visual tokens a row, group size."""
BACKENDS = {"cudnn": "CUDNN_ATTENTION", "flash": "FLASH_ATTENTION", "efficient": "EFFICIENT_ATTENTION"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of this benchmark."""
    parser.add_argument("--bits", type=int, nargs="+", default=[1, 2, 4, 8], help="bits of keys and values")
    parser.add_argument(
        "--kernel", choices=("auto", "codes", "planes"), default="auto", help="which kernel (default: auto)"
    )
    parser.add_argument(
        "--correction", choices=("expected", "affine", "none"), default="expected", help="score correction"
    )


def run(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """Rows of the table."""
    import torch

    kernels, bandwidth = gpu.library(), gpu.copy_bandwidth()
    rows = []
    for name, (batch, query_heads, kv_heads, cached, group_size) in SHAPES.items():
        rivals = _rivals(batch, query_heads, kv_heads, cached)
        for bits in arguments.bits:
            call = gpu.Call(
                kernels,
                rows=batch,
                query_heads=query_heads,
                kv_heads=kv_heads,
                cached=cached,
                group_size=group_size,
                bits=bits,
                kernel=arguments.kernel,
                correction=arguments.correction,
            )
            call.output.fill_(math.nan)
            output = call.attend()[:2].double()
            off = _error(call, output, arguments.correction)
            time = gpu.microseconds(call.attend)
            rows.append(
                {
                    "shape": name,
                    "bits": bits,
                    "us": round(time, 1),
                    "% of copy": round(100 * call.cache_bytes / time / 1e3 / bandwidth, 1),
                    **{f"x {rival}": round(us / time, 2) for rival, us in rivals.items()},
                    "error": f"{off:.1e}",
                    "copy GB/s": round(bandwidth),
                    "device": torch.cuda.get_device_name(),
                }
            )
            del call, output
            torch.cuda.empty_cache()
    return rows


def _rivals(batch: int, query_heads: int, kv_heads: int, cached: int) -> dict[str, float]:
    """Microseconds of torch's attention backends on an FP16 cache of the same tokens."""
    import torch
    from torch.nn.attention import SDPBackend, sdpa_kernel

    query = torch.randn(batch, query_heads, 1, 128, device="cuda", dtype=torch.float16)
    key, value = (torch.randn(batch, kv_heads, cached, 128, device="cuda", dtype=torch.float16) for _ in range(2))
    times = {}
    for name, backend in BACKENDS.items():
        with sdpa_kernel([getattr(SDPBackend, backend)]):

            def attend() -> Any:
                return torch.nn.functional.scaled_dot_product_attention(
                    query, key, value, enable_gqa=query_heads > kv_heads
                )

            try:
                times[name] = gpu.microseconds(attend, inner=3)
            except RuntimeError:  # the backend does not take grouped heads
                times[name] = math.nan
    return times


def _error(call: gpu.Call, output: Any, correction: str) -> float:
    """Relative error of the first rows against float64; the own token takes part."""
    import torch

    t, rows = call.tensors, len(output)
    key, value = (x.double() for x in call.dequantized(rows))
    ratio = t["query"].shape[1] // key.shape[1]
    query = t["query"][:rows].double().unflatten(1, (-1, ratio)).squeeze(3)
    scores = query @ key.transpose(2, 3) * call.attribute_scale
    if correction == "expected":
        rest = t["visual_key_params"][:rows, :, :, 2].double()
        excess = 0.5 * call.attribute_scale**2 * query.square() @ rest.square().transpose(2, 3)
        counts = torch.tensor(call.counts, device="cuda")
        scores = scores + (excess / (1 + excess / 3.0)).repeat_interleave(counts, dim=-1)
    elif correction == "affine":
        low, high = scores.amin(-1, True), scores.amax(-1, True)
        scores = low + (scores - low) * ((high - 3.0 - low) / (high - low)).clamp(min=0)
    own = query @ t["key"][:rows].double().transpose(2, 3) * call.attribute_scale
    weights = torch.cat([scores, own], -1).softmax(-1)
    expected = weights @ torch.cat([value, t["value"][:rows].double()], 2)
    return float((output - expected.flatten(1, 2).unsqueeze(2)).norm() / expected.norm())
