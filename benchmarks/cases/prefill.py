"""Prefill attention of new tokens, causal, against torch's attention backends in the same run.

First calls have nothing cached. Later turns attend to a packed cache of visual tokens besides, torch to an FP16 cache
of as many tokens. Each row has the relative error against float64 over the same numbers.
"""

from __future__ import annotations

import argparse
import math
from typing import Any

from benchmarks.lib import gpu

FIRST = {
    "B4 Hq32 Hkv32 S2048": (4, 32, 32, 2048, 128),
    "B1 Hq32 Hkv32 S8192": (1, 32, 32, 8192, 128),
    "B4 Hq32 Hkv8 S2048": (4, 32, 8, 2048, 128),
    "B4 Hq32 Hkv32 S2048 D64": (4, 32, 32, 2048, 64),
    "B4 Hq32 Hkv32 S2048 D96": (4, 32, 32, 2048, 96),
    "B4 Hq32 Hkv32 S2048 D256": (4, 32, 32, 2048, 256),
}
"""Rows, query heads, KV heads, new positions, head dim."""
LATER = {
    "B4 Hq32 Hkv32 S512 T8192": (4, 32, 32, 512, 8192, 1024),
    "B4 Hq32 Hkv8 S512 T8192": (4, 32, 8, 512, 8192, 1024),
    "B8 Hq32 Hkv32 S64 T2304": (8, 32, 32, 64, 2304, 768),
}
"""Rows, query heads, KV heads, new positions, cached visual tokens, group size; head dim 128."""
LATER_CACHES = ((1, "expected"), (1, "none"), (1, "affine"), (2, "expected"), (4, "expected"), (8, "expected"))
BACKENDS = {"flash": "FLASH_ATTENTION", "cudnn": "CUDNN_ATTENTION", "efficient": "EFFICIENT_ATTENTION"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """This benchmark has no options of its own."""


def run(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """Rows of the table; TFLOP/s count the products of pairs that are attended to."""
    import torch

    kernels, rows = gpu.library(), []
    for name, (batch, query_heads, kv_heads, positions, head_dim) in FIRST.items():
        call = gpu.OperatorCall(
            kernels, rows=batch, query_heads=query_heads, kv_heads=kv_heads, positions=positions, head_dim=head_dim
        )
        rivals = _rivals(call, *(call.tensors[name] for name in ("key", "value")))
        rows.append(_row(name, "", "", call, rivals))
        del call
        torch.cuda.empty_cache()
    for name, (batch, query_heads, kv_heads, positions, cached, group_size) in LATER.items():
        rivals = {}
        for bits, correction in LATER_CACHES:
            call = gpu.OperatorCall(
                kernels,
                rows=batch,
                query_heads=query_heads,
                kv_heads=kv_heads,
                positions=positions,
                cached=cached,
                group_size=group_size,
                bits=bits,
                correction=correction,
            )
            rivals = rivals or _rivals(
                call, *(torch.randn(batch, kv_heads, cached + positions, 128, device="cuda").half() for _ in range(2))
            )
            rows.append(_row(name, str(bits), correction, call, rivals))
            del call
            torch.cuda.empty_cache()
    return rows


def _row(name: str, bits: str, correction: str, call: gpu.OperatorCall, rivals: dict[str, float]) -> dict[str, Any]:
    import torch

    batch, query_heads, positions, head_dim = call.output.shape
    call.output.fill_(math.nan)
    off = _error(call, call.attend())
    time = gpu.microseconds(call.attend, inner=2)
    pairs = positions * (positions / 2 + (sum(call.counts) if bits else 0))
    operations = 4 * batch * query_heads * pairs * head_dim
    return {
        "shape": name,
        "bits": bits,
        "correction": correction,
        "us": round(time, 1),
        "TFLOP/s": round(operations / time / 1e6),
        **{f"{rival} TFLOP/s": round(operations / us / 1e6) if us == us else "" for rival, us in rivals.items()},
        "of flash": round(rivals["flash"] / time, 2),
        "error": f"{off:.1e}",
        "device": torch.cuda.get_device_name(),
    }


def _rivals(call: gpu.OperatorCall, key: Any, value: Any) -> dict[str, float]:
    """Microseconds of torch's backends, NaN where one does not take the call. The last keys are the new positions."""
    import torch
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.nn.attention.bias import causal_lower_right

    query = call.tensors["query"]
    ratio, positions, keys = query.shape[1] // key.shape[1], query.shape[2], key.shape[2]
    key, value = (x.repeat_interleave(ratio, 1) for x in (key, value))
    mask = {"is_causal": True} if keys == positions else {"attn_mask": causal_lower_right(positions, keys)}
    times = {}
    for name, backend in BACKENDS.items():
        with sdpa_kernel([getattr(SDPBackend, backend)]):

            def attend() -> Any:
                return torch.nn.functional.scaled_dot_product_attention(query, key, value, **mask)

            try:
                times[name] = gpu.microseconds(attend, inner=2)
            except RuntimeError:
                times[name] = math.nan
    return times


def _error(call: gpu.OperatorCall, output: Any) -> float:
    """Relative error of the first row's first two KV heads against float64."""
    import torch

    t, scale, correction = call.tensors, call.attribute_scale, call.correction
    ratio = t["query"].shape[1] // t["key"].shape[1]
    squared, total, counts = 0.0, 0.0, torch.tensor(call.counts, device="cuda")
    for head in range(min(2, t["key"].shape[1])):
        own_key, own_value = t["key"][0, head].double(), t["value"][0, head].double()
        cached_key, cached_value = (x[0, head].double() for x in call.dequantized(1))
        positions = len(own_key)
        future = torch.ones(positions, positions, dtype=torch.bool, device="cuda").triu(1)
        for i in range(head * ratio, (head + 1) * ratio):
            query = t["query"][0, i].double()
            scores = query @ cached_key.T * scale
            if correction == "expected":
                residual = t["visual_key_params"][0, head, :, 2].double()
                excess = 0.5 * scale**2 * query.square() @ residual.square().T
                scores = scores + (excess / (1 + excess / 3.0)).repeat_interleave(counts, dim=-1)
            elif correction == "affine" and len(cached_key):
                low, high = scores.amin(-1, True), scores.amax(-1, True)
                scores = low + (scores - low) * ((high - 3.0 - low) / (high - low)).clamp(min=0)
            own = (query @ own_key.T * scale).masked_fill(future, -math.inf)
            expected = torch.cat([scores, own], -1).softmax(-1) @ torch.cat([cached_value, own_value])
            squared += float((output[0, i].double() - expected).square().sum())
            total += float(expected.square().sum())
    return math.sqrt(squared / total)
