"""Group quantisation of visual keys and values, and the packed bit-plane format (version 1).

A *group* is ``group_size`` consecutive visual tokens of one KV head; each of its channels has one scale and one
offset, so ``value = offset + scale * code``. Codes of 1, 2, 4 or 8 bits are stored as bit planes in INT32 words: keys
along channels, values along tokens, which are the axes that attention sums over.

Levels and codes are computed in FP32 on the device of the input. ``docs/format.md`` is the specification.
Sources: arXiv 2502.14882 v1 (``quantile``) and v2, CalibQuant (``shrink``); ``lloyd`` is Lloyd's algorithm per channel,
which finds a local minimum of the squared error.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from vkvx.errors import OptionError
from vkvx.format import (
    BITS,
    LLOYD_ITERATIONS,
    METRIC_QUANTIZERS,
    QUANTILE_ALPHA,
    QUANTIZERS,
    SHRINK_KEY,
    SHRINK_VALUE,
    TILE,
    WORD_BITS,
    auto_group_size,
    check_bits,
    check_quantizer,
)

__all__ = [
    "BITS",
    "QUANTILE_ALPHA",
    "QUANTIZERS",
    "SHRINK_KEY",
    "SHRINK_VALUE",
    "TILE",
    "WORD_BITS",
    "Quantized",
    "auto_group_size",
    "decode",
    "encode",
    "levels",
    "pack_keys",
    "pack_values",
    "quantize",
    "residual_rms",
    "sanitize",
    "unpack_keys",
    "unpack_values",
]

FP16_MAX = 65504.0


class Quantized(NamedTuple):
    """Codes [..., n, D] uint8 (0 on padding), scale and offset [..., D] FP16."""

    codes: Tensor
    scale: Tensor
    offset: Tensor


def sanitize(x: Tensor) -> Tensor:
    """FP32 copy in which NaN is 0 and everything else lies within the FP16 range."""
    return torch.nan_to_num(x.float(), nan=0.0, posinf=FP16_MAX, neginf=-FP16_MAX).clamp(-FP16_MAX, FP16_MAX)


def levels(
    x: Tensor, mask: Tensor, bits: int, quantizer: str, *, alpha: float = 0.0, gamma: float = 1.0
) -> tuple[Tensor, Tensor]:
    """Scale and offset of each channel of each group.

    Args:
        x: [..., n, D], any float dtype; the tokens of a group are axis -2.
        mask: [..., n] bool, true for valid tokens; padding never enters the statistics.
        bits: 1, 2, 4 or 8.
        quantizer: one of ``QUANTIZERS``, but for those that need a metric (``vkvx.plugins.reference.shaping``).
        alpha: tail of ``quantile``, 0 <= alpha < 0.5.
        gamma: factor of ``shrink``.

    Returns:
        scale and offset, [..., D] FP16. A constant channel has scale 0 and its value as offset.

    Raises:
        OptionError: for an unknown number of bits, or a quantiser that is unknown or needs a metric.
    """
    check_bits(bits)
    check_quantizer(quantizer)
    if quantizer in METRIC_QUANTIZERS:
        raise OptionError(f"the quantizer '{quantizer}' needs a metric: use vkvx.plugins.reference.shaping")
    valid = mask.unsqueeze(-1)
    count = valid.sum(-2).clamp(min=1).float()
    x = torch.where(valid, sanitize(x), 0.0)
    mean = x.sum(-2) / count
    centred = torch.where(valid, x - mean.unsqueeze(-2), 0.0)
    low = centred.masked_fill(~valid, torch.inf).amin(-2)
    high = centred.masked_fill(~valid, -torch.inf).amax(-2)
    varies = high > low
    top = 2**bits - 1
    if quantizer == "quantile":
        low, high = _quantiles(centred, valid, count, alpha)
    elif quantizer == "shrink":
        low, high = gamma * (low + mean) - mean, gamma * (high + mean) - mean
    elif quantizer == "lloyd" and bits == 1:
        low, high = _lloyd_two_levels(centred, valid)
    elif quantizer not in ("minmax", "lloyd"):
        raise ValueError(f"the quantizer '{quantizer}' has no levels here")
    scale = (high - low) / top
    if quantizer == "lloyd" and bits > 1:
        low, scale = _lloyd_uniform(centred, valid, count, low, scale, top)
    scale16 = torch.where(varies, scale, 0.0).clamp(0.0, FP16_MAX).half()
    offset = torch.where(scale16 > 0, low + mean, mean)
    return scale16, offset.clamp(-FP16_MAX, FP16_MAX).half()


def _quantiles(centred: Tensor, valid: Tensor, count: Tensor, alpha: float) -> tuple[Tensor, Tensor]:
    """Quantiles alpha and 1 - alpha over valid tokens, linear between order statistics at alpha * (n - 1)."""
    ordered = centred.masked_fill(~valid, torch.inf).sort(-2).values
    last = (count - 1).expand(ordered.shape[:-2] + ordered.shape[-1:])

    def at(position: Tensor) -> Tensor:
        below = position.floor()
        above = torch.minimum(below + 1, last)
        a = ordered.gather(-2, below.long().unsqueeze(-2)).squeeze(-2)
        b = ordered.gather(-2, above.long().unsqueeze(-2)).squeeze(-2)
        return a + (b - a) * (position - below)

    return at(alpha * last), at((1.0 - alpha) * last)


def _lloyd_two_levels(centred: Tensor, valid: Tensor) -> tuple[Tensor, Tensor]:
    """Lloyd's algorithm for two free levels from the mean as threshold; a side without tokens keeps the threshold."""
    threshold = torch.zeros_like(centred[..., 0, :])
    for _ in range(LLOYD_ITERATIONS):
        above = valid & (centred > threshold.unsqueeze(-2))
        below = valid & ~above
        count_above, count_below = above.sum(-2), below.sum(-2)
        high = torch.where(above, centred, 0.0).sum(-2) / count_above.clamp(min=1)
        low = torch.where(below, centred, 0.0).sum(-2) / count_below.clamp(min=1)
        high = torch.where(count_above > 0, high, threshold)
        low = torch.where(count_below > 0, low, threshold)
        threshold = (low + high) / 2
    return low, high


def _lloyd_uniform(
    centred: Tensor, valid: Tensor, count: Tensor, low: Tensor, scale: Tensor, top: int
) -> tuple[Tensor, Tensor]:
    """Alternate between assigning codes and fitting scale and offset by least squares, from the min-max levels."""
    weight = valid.float()
    mean = centred.sum(-2) / count
    for _ in range(LLOYD_ITERATIONS):
        step = torch.where(scale > 0, scale, 1.0).unsqueeze(-2)
        code = ((centred - low.unsqueeze(-2)) / step).round().clamp(0, top)
        code_mean = (code * weight).sum(-2) / count
        spread = (code - code_mean.unsqueeze(-2)) * weight
        variance = spread.square().sum(-2) / count
        covariance = (spread * centred).sum(-2) / count
        fits = variance > 0
        scale = torch.where(fits, covariance / torch.where(fits, variance, 1.0), scale)
        low = torch.where(fits, mean - scale * code_mean, low)
    return low, scale


def encode(x: Tensor, scale: Tensor, offset: Tensor, bits: int) -> Tensor:
    """Codes clamp(round_half_even((x - offset) / scale), 0, 2**bits - 1); a scale of 0 gives code 0.

    x is [..., n, D], scale and offset [..., D] (FP16); the result is uint8 [..., n, D].
    """
    step = scale.float().unsqueeze(-2)
    ratio = (sanitize(x) - offset.float().unsqueeze(-2)) / torch.where(step > 0, step, 1.0)
    codes = ratio.round().clamp(0, 2**bits - 1)
    return torch.where(step > 0, codes, 0.0).to(torch.uint8)


def decode(codes: Tensor, scale: Tensor, offset: Tensor) -> Tensor:
    """FP32 offset + scale * code; codes [..., n, D], scale and offset [..., D]."""
    return offset.float().unsqueeze(-2) + scale.float().unsqueeze(-2) * codes.float()


def quantize(
    x: Tensor, mask: Tensor, bits: int, quantizer: str, *, alpha: float = 0.0, gamma: float = 1.0
) -> Quantized:
    """Levels and codes of groups: x [..., n, D], mask [..., n]. Padding gets code 0. Arguments as in ``levels``."""
    scale, offset = levels(x, mask, bits, quantizer, alpha=alpha, gamma=gamma)
    codes = encode(x, scale, offset, bits)
    return Quantized(torch.where(mask.unsqueeze(-1), codes, 0), scale, offset)


def residual_rms(x: Tensor, mask: Tensor, quantized: Quantized) -> Tensor:
    """Root mean square of x less its dequantised value over the valid tokens of a group: FP16 [..., D]."""
    valid = mask.unsqueeze(-1)
    residual = sanitize(x) - decode(quantized.codes, quantized.scale, quantized.offset)
    count = valid.sum(-2).clamp(min=1).float()
    return (torch.where(valid, residual, 0.0).square().sum(-2) / count).sqrt().clamp(max=FP16_MAX).half()


def pack_keys(codes: Tensor, bits: int) -> Tensor:
    """Codes [..., n, D] to INT32 [..., n/128, bits, 128, D/32]: bit i of word w is that of channel 32w + i."""
    return _pack_last(_tiles(codes, bits), bits)


def unpack_keys(words: Tensor) -> Tensor:
    """Inverse of ``pack_keys``: uint8 [..., n, D]."""
    return _unpack_last(words).flatten(-3, -2)


def pack_values(codes: Tensor, bits: int) -> Tensor:
    """Codes [..., n, D] to INT32 [..., n/128, bits, D, 4]: bit i of word w, plane p is bit p of token 32w + i."""
    return _pack_last(_tiles(codes, bits).transpose(-1, -2), bits)


def unpack_values(words: Tensor) -> Tensor:
    """Inverse of ``pack_values``: uint8 [..., n, D]."""
    return _unpack_last(words).transpose(-1, -2).flatten(-3, -2)


def _tiles(codes: Tensor, bits: int) -> Tensor:
    check_bits(bits)
    tokens, channels = codes.shape[-2:]
    if tokens % TILE or channels % WORD_BITS:
        raise OptionError(
            f"cannot pack {tokens} tokens of {channels} channels: give multiples of {TILE} and {WORD_BITS}"
        )
    return codes.unflatten(-2, (tokens // TILE, TILE))


def _pack_last(codes: Tensor, bits: int) -> Tensor:
    """[..., rows, columns] to planes of words [..., bits, rows, columns/32], least significant bit first."""
    planes = torch.stack([(codes >> p) & 1 for p in range(bits)], dim=-3)
    grouped = planes.unflatten(-1, (-1, WORD_BITS)).to(torch.int32)
    shifts = torch.arange(WORD_BITS, dtype=torch.int32, device=codes.device)
    # Each bit is set once, so the INT32 sum is exact; the top bit is the sign and gives -2**31.
    return (grouped << shifts).sum(-1, dtype=torch.int32)


def _unpack_last(words: Tensor) -> Tensor:
    """Planes of words [..., bits, rows, columns/32] to codes [..., rows, columns], uint8."""
    shifts = torch.arange(WORD_BITS, dtype=torch.int32, device=words.device)
    bits = ((words.unsqueeze(-1) >> shifts) & 1).to(torch.uint8).flatten(-2)
    planes = bits.unbind(-3)
    codes = planes[0]
    for p, plane in enumerate(planes[1:], start=1):
        codes = codes | (plane << p)
    return codes
