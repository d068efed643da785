"""The quantiser ``shaped``: levels and codes whose error lies where attention does not look.

Attention sees an error e of a key through scores, q . e, and an error of a value through the output projection, W e.
So what counts is not e . e but e . H e, with the *metric* H the second moment of the queries to come, or W^T W. Both
are known from the weights (``models/graph/metric.py``). ``shape`` minimises the sum of e . H e over a group's tokens,
one channel after the other: each channel makes up for the errors that the others have left. That is Lloyd's algorithm
in the metric H; with H = 1 it is Lloyd's algorithm. Levels and codes change, the format and the cost of reading do not.

Choosing codes to compensate for earlier rounding is known for weights (OBQ, arXiv 2208.11580; GPTQ, arXiv 2210.17323).
"""

from __future__ import annotations

import torch
from torch import Tensor

from vkvx.format import WORD_BITS
from vkvx.plugins.reference.quantization import FP16_MAX, Quantized, decode, encode, levels, sanitize
from vkvx.plugins.rotary import rotary_pairs

FITS = 2
"""Sweeps over the channels that choose codes and levels; one more chooses the codes for the rounded levels."""


def rotate(
    metric: Tensor, cosine: Tensor, sine: Tensor, rotary_dim: int = 0, rotary_interleaved: bool = False
) -> Tensor:
    """R H R^T, with R the rotary embedding of one position: metric [..., D, D], cosine and sine [..., D], FP32.

    ``rotary_dim`` and ``rotary_interleaved`` as in :func:`vkvx.plugins.rotary.rotary_pairs`.
    """
    pairs = rotary_pairs(metric.shape[-1], rotary_dim, rotary_interleaved)
    partner, sign = (torch.from_numpy(x).to(metric.device) for x in pairs)
    sine = sine * sign

    def rows(matrix: Tensor, c: Tensor, s: Tensor) -> Tensor:
        return matrix * c.unsqueeze(-1) + matrix.index_select(-2, partner) * s.unsqueeze(-1)

    half = rows(metric.float(), cosine, sine)
    return rows(half.transpose(-1, -2), cosine, sine).transpose(-1, -2)


def shape(x: Tensor, mask: Tensor, bits: int, metric: Tensor, *, fits: int = FITS) -> Quantized:
    """Scale, offset and codes of groups by coordinate descent on the sum of e . H e.

    Args:
        x: [..., n, D], any float dtype; the tokens of a group are axis -2.
        mask: [..., n] bool, true for valid tokens; padding takes no part and gets code 0.
        bits: 1, 2, 4 or 8.
        metric: H, FP32 [..., D, D], symmetric with a positive diagonal; its leading axes broadcast.
        fits: sweeps that choose codes and levels; the format's is ``FITS``, others are for comparison.

    Returns:
        as :func:`vkvx.plugins.reference.quantization.quantize`. A constant channel keeps scale 0 and is exact.
    """
    top = 2**bits - 1
    valid = mask.unsqueeze(-2).float()  # [..., 1, n]
    count = valid.sum(-1).clamp(min=1)
    clean = torch.where(mask.unsqueeze(-1), sanitize(x), 0.0).transpose(-1, -2).contiguous()  # [..., D, n]
    mean = clean.sum(-1) / count  # [..., D]
    target = (clean - mean.unsqueeze(-1)) * valid
    start = levels(x, mask, bits, "lloyd")
    varies = start[0] > 0
    scale, low = start[0].float(), start[1].float() - mean
    codes = encode(x, *start, bits).transpose(-1, -2).float()
    for _ in range(fits):
        value = (low.unsqueeze(-1) + scale.unsqueeze(-1) * codes) * valid
        scale, low, codes = _sweep(target, valid, count, value, scale, low, metric, top, fit=True)
    scale16, offset16 = _rounded(scale, low, mean, varies)
    scale, low = scale16.float(), offset16.float() - mean
    value = (low.unsqueeze(-1) + scale.unsqueeze(-1) * codes) * valid
    codes = _sweep(target, valid, count, value, scale, low, metric, top, fit=False)[2]
    codes = torch.where(scale.unsqueeze(-1) > 0, codes, 0.0) * valid
    return Quantized(codes.transpose(-1, -2).to(torch.uint8), scale16, offset16)


def _sweep(
    target: Tensor,
    valid: Tensor,
    count: Tensor,
    value: Tensor,
    scale: Tensor,
    low: Tensor,
    metric: Tensor,
    top: int,
    fit: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """One pass over the channels: target, value [..., D, n]; scale, low [..., D]. Returns scale, low and codes.

    ``pull`` is H e. Within a block of channels it is kept up to date; the other blocks follow when a block is done.
    """
    pull = metric @ (target - value)
    scales, lows, codes = [], [], []
    for first in range(0, target.shape[-2], WORD_BITS):
        block = slice(first, first + WORD_BITS)
        own = pull[..., block, :].clone()
        moves = []
        for i, channel in enumerate(range(first, first + WORD_BITS)):
            step, base, before = scale[..., channel, None], low[..., channel, None], value[..., channel, :]
            # Where this channel would have to be for the sum to be least, the others staying as they are.
            wanted = (before + own[..., i, :] / metric[..., channel, channel, None]) * valid[..., 0, :]
            code = ((wanted - base) / torch.where(step > 0, step, 1.0)).round().clamp(0, top) * valid[..., 0, :]
            if fit:
                step, base = _fit(wanted, code, valid[..., 0, :], count, step, base)
            move = torch.where(step > 0, (base + step * code) * valid[..., 0, :] - before, 0.0)
            own -= metric[..., block, channel, None] * move.unsqueeze(-2)
            moves.append(move)
            scales.append(step)
            lows.append(base)
            codes.append(code)
        pull = pull - metric[..., :, block] @ torch.stack(moves, -2)
    return torch.cat(scales, -1), torch.cat(lows, -1), torch.stack(codes, -2)


def _fit(
    wanted: Tensor, code: Tensor, valid: Tensor, count: Tensor, scale: Tensor, low: Tensor
) -> tuple[Tensor, Tensor]:
    """Least squares fit of wanted by low + scale * code; as before where all codes are equal or the scale is 0."""
    code_mean = code.sum(-1, keepdim=True) / count
    wanted_mean = wanted.sum(-1, keepdim=True) / count
    spread = (code - code_mean) * valid
    variance = spread.square().sum(-1, keepdim=True)
    fits = (variance > 0) & (scale > 0)
    slope = (spread * wanted).sum(-1, keepdim=True) / torch.where(fits, variance, 1.0)
    return torch.where(fits, slope, scale), torch.where(fits, wanted_mean - slope * code_mean, low)


def _rounded(scale: Tensor, low: Tensor, mean: Tensor, varies: Tensor) -> tuple[Tensor, Tensor]:
    """Scale and offset in FP16; the mean is the one level where the scale vanishes."""
    scale16 = torch.where(varies, scale, 0.0).clamp(0.0, FP16_MAX).half()
    offset = torch.where(scale16 > 0, low + mean, mean)
    return scale16, offset.clamp(-FP16_MAX, FP16_MAX).half()


def shaped_rms(x: Tensor, mask: Tensor, quantized: Quantized, metric: Tensor) -> Tensor:
    """FP16 [..., D]: the RMS of the residual per channel, times one factor per group.

    The rests of the channels cancel each other in scores, so their RMS alone would overstate the error of a score. The
    factor makes the sum of H_cc * rms_c^2 what the mean of e . H e is; it is 1 for a diagonal metric.
    """
    residual = torch.where(mask.unsqueeze(-1), sanitize(x) - decode(*quantized), 0.0)
    count = mask.sum(-1).clamp(min=1).float()
    square = residual.square().sum(-2) / count.unsqueeze(-1)
    whole = ((residual @ metric) * residual).sum((-1, -2)) / count
    apart = (square * metric.diagonal(dim1=-2, dim2=-1)).sum(-1)
    factor = torch.where(apart > 0, whole.clamp(min=0.0) / torch.where(apart > 0, apart, 1.0), 1.0)
    return (square * factor.unsqueeze(-1)).sqrt().clamp(max=FP16_MAX).half()
