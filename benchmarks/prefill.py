"""Prefill attention of new tokens, causal, against torch's flash attention."""

from __future__ import annotations

import argparse
from typing import Any

from benchmarks import gpu

SHAPES = {
    "B4 Hq32 Hkv32 S2048": (4, 32, 32, 2048),
    "B1 Hq32 Hkv32 S8192": (1, 32, 32, 8192),
    "B4 Hq32 Hkv8 S2048": (4, 32, 8, 2048),
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """This benchmark has no options of its own."""


def run(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """Rows of the table; TFLOP/s count the products below the diagonal."""
    import torch
    from torch.nn.attention import SDPBackend, sdpa_kernel

    kernels, rows = gpu.library(), []
    for name, (batch, query_heads, kv_heads, positions) in SHAPES.items():
        call = gpu.Call(kernels, rows=batch, query_heads=query_heads, kv_heads=kv_heads, positions=positions)
        key, value = (call.tensors[n].repeat_interleave(query_heads // kv_heads, 1) for n in ("key", "value"))

        def flash(query: Any = call.tensors["query"], key: Any = key, value: Any = value) -> Any:
            return torch.nn.functional.scaled_dot_product_attention(query, key, value, is_causal=True)

        with sdpa_kernel([SDPBackend.FLASH_ATTENTION]):
            rival = gpu.microseconds(flash, inner=2)
        time = gpu.microseconds(call.attend, inner=2)
        exact = torch.nn.functional.scaled_dot_product_attention(
            *(x[:1, :2].double() for x in (call.tensors["query"], key, value)), is_causal=True
        )
        off = float((call.output[:1, :2].double() - exact).norm() / exact.norm())
        operations = 2 * batch * query_heads * positions**2 * 128
        rows.append(
            {
                "shape": name,
                "us": round(time, 1),
                "TFLOP/s": round(operations / time / 1e6),
                "flash TFLOP/s": round(operations / rival / 1e6),
                "of flash": round(rival / time, 2),
                "error": f"{off:.1e}",
                "device": torch.cuda.get_device_name(),
            }
        )
    return rows
