"""What decode attention over a packed cache competes with: torch's attention on 16-bit and 8-bit caches, and packed
caches without libvkvx. Each rival is checked against float64 over the cache that it reads, then timed.
"""

from __future__ import annotations

import functools
import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from benchmarks.lib import gpu
from vkvx.errors import VkvxError

BACKENDS = {"cudnn": "CUDNN_ATTENTION", "flash": "FLASH_ATTENTION", "efficient": "EFFICIENT_ATTENTION"}
"""torch's backends of ``scaled_dot_product_attention`` for FP16."""
LIMIT = 5e-3
"""Relative error past which a result counts as wrong: FP16 products and weights stay below a fifth of it."""
_ROWS = 2
"""Rows that are compared with float64."""


@dataclass(frozen=True)
class RivalTime:
    """A method's time in microseconds and relative error; `us` is None, and `note` says why, if it did not work."""

    method: str
    bits: int
    cache_bytes: int
    us: float | None = None
    error: float | None = None
    note: str = ""

    def row(self, shape: str, bandwidth: float) -> dict[str, Any]:
        """A row of results; `bandwidth` is in GB/s, "% of copy" counts the cache as stored, read once."""
        return {
            "shape": shape,
            "method": self.method,
            "bits": self.bits,
            "us": None if self.us is None else round(self.us, 2),
            "% of copy": None if self.us is None else round(self.cache_bytes / self.us / 1e1 / bandwidth, 1),
            "error": None if self.error is None else float(f"{self.error:.1e}"),
            "note": self.note,
            "copy GB/s": round(bandwidth),
        }


def measure(
    method: str, bits: int, cache_bytes: int, attend: Callable[[], Any], expected: Any, *, cold: bool = False
) -> RivalTime:
    """Check the first rows of what `attend` returns, then time it. What it does not support becomes a note."""
    import torch

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            error = gpu.relative_error(attend()[: len(expected)], expected)
            if error > LIMIT:
                return RivalTime(method, bits, cache_bytes, None, error, f"wrong result, relative error {error:.1e}")
            return RivalTime(method, bits, cache_bytes, gpu.microseconds(attend, cold=cold), error)
        except (torch.OutOfMemoryError, VkvxError):
            raise
        except Exception as error:  # torch and Triton refuse with many types
            reasons = [str(error), *(str(warning.message) for warning in caught)]
            lines = [reason.strip().splitlines()[0].partition(" (Triggered")[0] for reason in reasons if reason.strip()]
            return RivalTime(method, bits, cache_bytes, note="not offered: " + "; ".join(dict.fromkeys(lines)))


def exact(query: Any, key: Any, value: Any) -> Any:
    """Float64 attention of the first rows of query [B, Hq, 1, D] over key and value [B, Hkv, T, D]."""
    query, key, value = (x[:_ROWS].double() for x in (query, key, value))
    folded = query.unflatten(1, (key.shape[1], -1)).squeeze(3)
    weights = (folded @ key.transpose(2, 3) * query.shape[-1] ** -0.5).softmax(-1)
    return (weights @ value).flatten(1, 2).unsqueeze(2)


def sixteen_bits(shape: gpu.DecodeShape, *, cold: bool = False) -> tuple[list[RivalTime], Callable[..., Any] | None]:
    """Each FP16 backend, in the faster of its forms, and the fastest of all as a function of query, key and value."""
    query, key, value = _random(shape)
    expected, best, outcomes = exact(query, key, value), (math.inf, None), []
    for name in BACKENDS:
        forms = []
        for folded in (False, True) if shape.query_heads > shape.kv_heads else (False,):
            attend = functools.partial(_sdpa, name, folded)
            call = functools.partial(attend, query, key, value)
            outcome = measure(name, 16, 4 * key.numel(), call, expected, cold=cold)
            forms.append(outcome)
            if outcome.us is not None and outcome.us < best[0]:
                best = (outcome.us, attend)
        outcomes.append(min(forms, key=lambda outcome: math.inf if outcome.us is None else outcome.us))
    return outcomes, best[1]


def _sdpa(backend: str, folded: bool, query: Any, key: Any, value: Any) -> Any:
    """`folded`: the query heads of a KV head take the place of positions, which any backend takes."""
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.nn.functional import scaled_dot_product_attention

    with sdpa_kernel([getattr(SDPBackend, BACKENDS[backend])]):
        if folded:
            query = query.unflatten(1, (key.shape[1], -1)).squeeze(3)
            return scaled_dot_product_attention(query, key, value).flatten(1, 2).unsqueeze(2)
        return scaled_dot_product_attention(query, key, value, enable_gqa=query.shape[1] > key.shape[1])


def eight_bits(shape: gpu.DecodeShape) -> list[RivalTime]:
    """Caches that are 8 bits as a whole, as far as torch takes them; the query stays FP16 where it may.

    FlexAttention takes keys and values of fewer bits than the query. For INT8 the scale of each (row, head, channel)
    multiplies the query and the output. SDPA and its variant with descaling are asked too.
    """
    import torch
    from torch.nn.attention.flex_attention import flex_attention

    torch._dynamo.reset()  # at most 8 versions of a function are compiled otherwise
    query, key, value = _random(shape)
    grouped, size = shape.query_heads > shape.kv_heads, 2 * key.numel()
    # Grouped heads in the place of positions: FlexAttention knows groups of a power of two only, and leaves its decode
    # kernel for others.
    folded, unfold = query.unflatten(1, (shape.kv_heads, -1)).squeeze(3), (lambda x: x.flatten(1, 2).unsqueeze(2))
    key8, value8 = key.to(torch.float8_e4m3fn), value.to(torch.float8_e4m3fn)
    flex = torch.compile(flex_attention, dynamic=False)
    outcomes = [measure("flex fp8", 8, size, lambda: unfold(flex(folded, key8, value8)), exact(query, key8, value8))]

    def quantized() -> Any:
        from torch.nn.attention.experimental._scaled_dot_product_attention_quantized import (
            _scaled_dot_product_attention_quantized as attend,
        )

        ones = torch.ones(shape.rows, shape.kv_heads, device="cuda")
        return attend(query.to(key8.dtype), key8, value8, q_descale=ones, k_descale=ones, v_descale=ones)

    def plain() -> Any:
        return torch.nn.functional.scaled_dot_product_attention(query.to(key8.dtype), key8, value8, enable_gqa=grouped)

    expected = exact(query.to(key8.dtype), key8, value8)
    outcomes += [measure(name, 8, size, call, expected) for name, call in (("SDPA fp8", plain), ("FA3 fp8", quantized))]

    key_scale, value_scale = (x.abs().amax(2, keepdim=True).float() / 127 for x in (key, value))
    key8, value8 = ((x / s).round().to(torch.int8) for x, s in ((key, key_scale), (value, value_scale)))

    def attend_int8(query: Any, key: Any, value: Any, key_scale: Any, value_scale: Any) -> Any:
        return (flex_attention((query * key_scale).half(), key, value) * value_scale).half()

    compiled = torch.compile(attend_int8, dynamic=False)
    expected = exact(query, key8 * key_scale, value8 * value_scale)
    call = functools.partial(compiled, folded, key8, value8, key_scale, value_scale)
    return [*outcomes, measure("flex int8", 8, size, lambda: unfold(call()), expected)]


def packed(call: gpu.OperatorCall, bits: int, attend16: Callable[..., Any] | None) -> list[RivalTime]:
    """The packed cache without libvkvx: written out as FP16 for `attend16`, and by Triton kernels that unpack.

    Neither corrects scores nor takes the own token.
    """
    query, names = call.tensors["query"], ("visual_key", "visual_key_params", "visual_value", "visual_value_params")
    words, cached = [call.tensors[name] for name in names], sum(call.counts)
    expected = exact(query, *call.dequantized(_ROWS))

    def kernels() -> Any:
        from benchmarks.lib import triton_rival

        return triton_rival.attend(query, *words, cached=cached, scale=call.attribute_scale)

    outcomes = [measure("triton", bits, call.cache_bytes, kernels, expected)]
    if attend16 is not None:
        shape = (*words[0].shape[:2], cached, query.shape[-1])
        key, value = query.new_empty(shape), query.new_empty(shape)

        def written_out() -> Any:
            from benchmarks.lib import triton_rival

            triton_rival.dequantize(*words, key=key, value=value)
            return attend16(query, key, value)

        outcomes.append(measure("dequantise", bits, call.cache_bytes, written_out, expected))
    return outcomes


def _random(shape: gpu.DecodeShape) -> list[Any]:
    """FP16 query, key and value."""
    import torch

    sizes = ((shape.query_heads, 1), (shape.kv_heads, shape.cached), (shape.kv_heads, shape.cached))
    return [torch.randn(shape.rows, *size, shape.head_dim, device="cuda", dtype=torch.float16) for size in sizes]
