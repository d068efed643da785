"""Triton kernels of decode steps: what lies between the matrix products, and the products of a single token.

A product of one token takes as long as reading its weights. Each program holds some rows of them; the norm ahead of the
product is taken along (its scale can be applied to the sums), and so is what follows: bias, gated activation, residual.
Everything is FP32 until a result is stored.

Kernels start while the one ahead still runs (programmatic dependent launch, compute capability 9.0): they fetch
weights, then wait, then read what other kernels have stored. As all of them wait, none overtakes one further ahead.
"""

# mypy: disable-error-code="no-untyped-def,no-untyped-call"
# (Triton's language has no types.)

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

if TYPE_CHECKING:
    from vkvx.runtime.backends.torch.fused import Norm


def tiles(columns: int, has_norm: bool) -> tuple[int, int, int]:
    """Rows and columns of a tile of weights, and warps of a program: the best of nine on an H200, for products that
    follow a norm, for heads, and for others."""
    if has_norm:
        return 8, 512, 4
    return (4, 512, 2) if columns > 16384 else (4 if columns > 2048 else 2, 1024, 4)


@triton.jit
def activated(x, ACTIVATION: tl.constexpr):
    """silu, or gelu in its form with tanh; FP32."""
    if ACTIVATION == "silu":
        return x / (1.0 + tl.exp(-x))
    return x / (1.0 + tl.exp(-1.5957691216057308 * (x + 0.044715 * x * x * x)))


@triton.jit
def _gain(gain, at, mask, GAIN_SHIFT: tl.constexpr):
    return tl.load(gain + at, mask=mask, other=0.0).to(tl.float32) + GAIN_SHIFT


@triton.jit
def product_kernel(
    x, weight, bias, gain, residual, out, N, K, eps, factor,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    HAS_NORM: tl.constexpr, GAIN_SHIFT: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_RESIDUAL: tl.constexpr,
    ACTIVATION: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """out [N] = residual + factor * (W norm(x) + bias), x [K].

    With an activation W is [2 N, K] and out = activated(first half) * second half.
    """
    if PDL:
        gdc_launch_dependents()
    GATED: tl.constexpr = ACTIVATION != ""
    row = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    live = row < N
    k = tl.arange(0, BLOCK_K)[None, :]
    place = weight + row[:, None] * K + k
    first = tl.load(place, mask=live[:, None] & (k < K), other=0.0)
    if GATED:
        second = tl.load(place + N * K, mask=live[:, None] & (k < K), other=0.0)
    if PDL:
        gdc_wait()
    a = tl.zeros((BLOCK_N, BLOCK_K), tl.float32)
    b = tl.zeros((BLOCK_N, BLOCK_K), tl.float32)
    square = tl.zeros((1, BLOCK_K), tl.float32)
    for start in range(0, K, BLOCK_K):
        at = k + start
        token = tl.load(x + at, mask=at < K, other=0.0).to(tl.float32)
        if HAS_NORM:
            square += token * token
            token *= _gain(gain, at, at < K, GAIN_SHIFT)
        # The next tile is on its way while this one is multiplied.
        place += BLOCK_K
        tile = first
        first = tl.load(place, mask=live[:, None] & (at + BLOCK_K < K), other=0.0)
        a += tile.to(tl.float32) * token
        if GATED:
            tile = second
            second = tl.load(place + N * K, mask=live[:, None] & (at + BLOCK_K < K), other=0.0)
            b += tile.to(tl.float32) * token
    total = tl.sum(a, 1)
    gate = total
    if GATED:
        total = tl.sum(b, 1)
    if HAS_NORM:
        scale = tl.rsqrt(tl.sum(tl.sum(square, 1), 0) / K + eps)
        total *= scale
        gate *= scale
    if HAS_BIAS:
        if GATED:
            gate += tl.load(bias + row, mask=live, other=0.0).to(tl.float32)
            total += tl.load(bias + N + row, mask=live, other=0.0).to(tl.float32)
        else:
            total += tl.load(bias + row, mask=live, other=0.0).to(tl.float32)
    if GATED:
        total *= activated(gate, ACTIVATION)
    if HAS_RESIDUAL:
        total = total * factor + tl.load(residual + row, mask=live, other=0.0).to(tl.float32)
    tl.store(out + row, total, mask=live)


@triton.jit
def norm_kernel(
    x, residual, gain, summed, out, eps, factor,
    SIZE: tl.constexpr, PADDED: tl.constexpr, GAIN_SHIFT: tl.constexpr, ADDED: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """RMS norm of tokens [SIZE], and a residual, which is ADDED "before" it (``summed`` is the sum then), "after" it,
    or "never"; x is multiplied by ``factor`` ahead of everything."""
    if PDL:
        gdc_launch_dependents()
    k = tl.arange(0, PADDED)
    live = k < SIZE
    weight = _gain(gain, k, live, GAIN_SHIFT)
    if PDL:
        gdc_wait()
    at = tl.program_id(0).to(tl.int64) * SIZE + k
    value = tl.load(x + at, mask=live, other=0.0).to(tl.float32) * factor
    if ADDED == "before":
        value += tl.load(residual + at, mask=live, other=0.0).to(tl.float32)
        # The norm is that of the sum as it is stored.
        value = value.to(summed.dtype.element_ty)
        tl.store(summed + at, value, mask=live)
        value = value.to(tl.float32)
    value *= tl.rsqrt(tl.sum(value * value, 0) / SIZE + eps) * weight
    if ADDED == "after":
        value += tl.load(residual + at, mask=live, other=0.0).to(tl.float32)
    tl.store(out + at, value, mask=live)


@triton.jit
def rotate_kernel(
    x, cosine, sine, query_gain, key_gain, stride, eps,
    QUERY_HEADS: tl.constexpr, SIZE: tl.constexpr, PADDED: tl.constexpr,
    HAS_NORM: tl.constexpr, GAIN_SHIFT: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Norm of the queries and keys of a token, head by head, and rotary embedding by halves of a head, in place.

    x has rows ``stride`` apart, query heads first; cosine and sine are [tokens, SIZE]; PADDED is for half a head.
    """
    if PDL:
        gdc_launch_dependents()
    token, head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    HALF: tl.constexpr = SIZE // 2
    i = tl.arange(0, PADDED)
    live = i < HALF
    if PDL:
        gdc_wait()
    place, turn = x + token * stride + head * SIZE + i, token * SIZE + i
    a = tl.load(place, mask=live, other=0.0).to(tl.float32)
    b = tl.load(place + HALF, mask=live, other=0.0).to(tl.float32)
    if HAS_NORM:
        scale = tl.rsqrt((tl.sum(a * a, 0) + tl.sum(b * b, 0)) / SIZE + eps)
        if head < QUERY_HEADS:
            a *= scale * _gain(query_gain, i, live, GAIN_SHIFT)
            b *= scale * _gain(query_gain, i + HALF, live, GAIN_SHIFT)
        else:
            a *= scale * _gain(key_gain, i, live, GAIN_SHIFT)
            b *= scale * _gain(key_gain, i + HALF, live, GAIN_SHIFT)
    first = a * tl.load(cosine + turn, mask=live, other=0.0) - b * tl.load(sine + turn, mask=live, other=0.0)
    turn += HALF
    second = b * tl.load(cosine + turn, mask=live, other=0.0) + a * tl.load(sine + turn, mask=live, other=0.0)
    tl.store(place, first, mask=live)
    tl.store(place + HALF, second, mask=live)


@triton.jit
def gate_kernel(x, out, N, ACTIVATION: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr):
    """out [tokens, N] = activated(first half) * second half of x [tokens, 2 N]."""
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    token, i = tl.program_id(0).to(tl.int64), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    gate = tl.load(x + token * 2 * N + i, mask=i < N, other=0.0).to(tl.float32)
    up = tl.load(x + token * 2 * N + N + i, mask=i < N, other=0.0).to(tl.float32)
    tl.store(out + token * N + i, activated(gate, ACTIVATION) * up, mask=i < N)


class Kernels:
    """The Triton kernels on tensors of a GPU, on its current stream; inputs are contiguous.

    ``pdl``: whether the GPU starts kernels early (compute capability 9.0).
    """

    def __init__(self, pdl: bool) -> None:
        self._pdl = {"PDL": pdl, "launch_pdl": pdl}

    def product(
        self,
        x: Tensor,
        module: Any,
        *,
        norm: Norm | None = None,
        residual: Tensor | None = None,
        factor: float = 1.0,
        activation: str = "",
    ) -> Tensor:
        """residual + factor * linear(norm(x)) of one token x [1, in]: [1, out].

        With an activation the weight holds gate and up, and the result is activation(gate) * up.
        """
        weight, bias = module.weight, module.bias
        size = weight.shape[1]
        columns = weight.shape[0] // (2 if activation else 1)
        out = x.new_empty(1, columns)
        rows, block, warps = tiles(columns, norm is not None)
        product_kernel[(triton.cdiv(columns, rows),)](
            *(x, weight, bias, None if norm is None else norm.weight, residual, out, columns, size),
            *(0.0 if norm is None else norm.eps, factor),
            BLOCK_N=rows,
            BLOCK_K=block,
            HAS_NORM=norm is not None,
            GAIN_SHIFT=0.0 if norm is None else norm.shift,
            HAS_BIAS=bias is not None,
            HAS_RESIDUAL=residual is not None,
            ACTIVATION=activation,
            num_warps=warps,
            **self._pdl,
        )
        return out

    def norm(self, x: Tensor, norm: Norm) -> Tensor:
        """norm(x), x [n, width]."""
        out = torch.empty_like(x)
        self._norm(x, None, norm, None, out, 1.0, "never")
        return out

    def added_norm(self, x: Tensor, residual: Tensor, norm: Norm, factor: float) -> tuple[Tensor, Tensor]:
        """residual + factor * x, and the norm of that."""
        summed, out = torch.empty_like(x), torch.empty_like(x)
        self._norm(x, residual, norm, summed, out, factor, "before")
        return summed, out

    def norm_added(self, x: Tensor, residual: Tensor, norm: Norm) -> Tensor:
        """residual + norm(x)."""
        out = torch.empty_like(x)
        self._norm(x, residual, norm, None, out, 1.0, "after")
        return out

    def _norm(self, *arguments: Any) -> None:
        x, residual, norm, summed, out, factor, added = arguments
        size = x.shape[1]
        norm_kernel[(len(x),)](
            *(x, residual, norm.weight, summed, out, norm.eps, factor),
            SIZE=size,
            PADDED=triton.next_power_of_2(size),
            GAIN_SHIFT=norm.shift,
            ADDED=added,
            num_warps=8,
            **self._pdl,
        )

    def rotate(self, qkv: Tensor, turns: list[Tensor], heads: tuple[int, int], norms: list[Norm]) -> None:
        """Norm and rotary embedding of the query and key heads of qkv [n, (Hq + 2 Hkv) D], in place.

        ``turns`` are cosine and sine [n, D]; ``norms`` those of queries and keys, or none.
        """
        query, key = norms or (None, None)
        dim = turns[0].shape[1]
        rotate_kernel[(len(qkv), sum(heads))](
            *(qkv, *turns, query and query.weight, key and key.weight, qkv.stride(0), query.eps if query else 0.0),
            QUERY_HEADS=heads[0],
            SIZE=dim,
            PADDED=triton.next_power_of_2(dim // 2),
            HAS_NORM=query is not None,
            GAIN_SHIFT=query.shift if query else 0.0,
            num_warps=1,
            **self._pdl,
        )

    def gate(self, x: Tensor, activation: str) -> Tensor:
        """activation(gate) * up of x [n, 2 width]: [n, width]."""
        columns = x.shape[1] // 2
        out = x.new_empty(len(x), columns)
        block = 1024
        gate_kernel[(len(x), triton.cdiv(columns, block))](
            x, out, columns, ACTIVATION=activation, BLOCK=block, num_warps=4, **self._pdl
        )
        return out
