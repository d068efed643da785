"""The quantiser ``shaped``: levels and codes whose error lies where attention does not look.

Attention sees an error e of a key through scores, q . e, and an error of a value through the output projection, W e.
So what counts is not e . e but e . H e, with the *metric* H the second moment of the queries to come, or W^T W. Both
are known from the weights (``models/graph/metric.py``). ``shape`` chooses the codes of a token so that its e . H e is
small, one channel after the other: each channel makes up for the errors that the others have left. The levels come
from mean and deviation of each channel, so tokens are independent of each other; a shift keeps the mean.

Choosing codes to compensate for earlier rounding is known for weights (OBQ, arXiv 2208.11580; GPTQ, arXiv 2210.17323).
"""

from __future__ import annotations

import torch
from torch import Tensor

from vkvx.format import SHAPED_FLAT_STEP, SHAPED_STEP, SHAPED_STEP_SLOPE, WORD_BITS
from vkvx.plugins.reference.quantization import FP16_MAX, Quantized, decode, sanitize
from vkvx.plugins.rotary import rotary_pairs


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


def level_distance(metric: Tensor, bits: int) -> Tensor:
    """Distance of two levels in standard deviations of a channel, FP32 [..., 1], for a metric [..., D, D].

    At 1 bit it depends on how flat the metric is. In plain distance errors cannot make up for each other, and the
    nearest of two levels must do; where they can, wider levels leave more to choose from.
    """
    wide = torch.full_like(metric[..., 0, :1], SHAPED_STEP[bits])
    if bits > 1:
        return wide
    trace = metric.diagonal(dim1=-2, dim2=-1).sum(-1, keepdim=True)
    flatness = trace.square() / (metric.shape[-1] * metric.square().sum((-2, -1)).unsqueeze(-1))
    return torch.minimum(SHAPED_FLAT_STEP + SHAPED_STEP_SLOPE * (1 - flatness), wide)


def shape(
    x: Tensor, mask: Tensor, bits: int, metric: Tensor, *, step: float | None = None, sweeps: int = 1
) -> Quantized:
    """Scale, offset and codes of groups; codes by coordinate descent on the sum of e . H e.

    Args:
        x: [..., n, D], any float dtype; the tokens of a group are axis -2.
        mask: [..., n] bool, true for valid tokens; padding takes no part and gets code 0.
        bits: 1, 2, 4 or 8.
        metric: H, FP32 [..., D, D], symmetric with a positive diagonal; its leading axes broadcast.
        step: distance of two levels in standard deviations, and
        sweeps: passes over the channels; the format's by default, others are for comparison.

    Returns:
        as :func:`vkvx.plugins.reference.quantization.quantize`. A constant channel keeps scale 0 and is exact.
    """
    scale, offset = _levels(x, mask, bits, level_distance(metric, bits) if step is None else step)
    wide, base = (row.float().unsqueeze(-1) for row in (scale, offset))
    divisor = torch.where(wide > 0, wide, torch.inf)
    target = torch.where(mask.unsqueeze(-1), sanitize(x), 0.0).transpose(-1, -2) - base  # [..., D, n]

    def nearest(wish: Tensor, channels: slice) -> Tensor:
        return (wish / divisor[..., channels, :]).round().clamp(0, 2**bits - 1)

    codes = nearest(target, slice(None))
    error = target - wide * codes
    pull = metric / metric.diagonal(dim1=-2, dim2=-1).unsqueeze(-1)
    for _ in range(sweeps):
        for first in range(0, target.shape[-2], WORD_BITS):
            block = slice(first, first + WORD_BITS)
            # What the channels of the block are pulled by, their own errors included; kept up to date within the block.
            pulled = pull[..., block, :] @ error
            for i in range(WORD_BITS):
                one = slice(first + i, first + i + 1)
                code = nearest(target[..., one, :] - error[..., one, :] + pulled[..., i : i + 1, :], one)
                now = target[..., one, :] - wide[..., one, :] * code
                pulled += pull[..., block, one] * (now - error[..., one, :])
                codes[..., one, :], error[..., one, :] = code, now
    codes = (codes.transpose(-1, -2) * mask.unsqueeze(-1)).to(torch.uint8)
    # Errors with a mean of 0: the mean over tokens stays, and of all offsets these have the least sum of e . H e.
    left = torch.where(mask.unsqueeze(-1), sanitize(x) - decode(codes, scale, offset), 0.0)
    shifted = offset.float() + left.sum(-2) / mask.sum(-1, keepdim=True).clamp(min=1)
    return Quantized(codes, scale, torch.where(scale > 0, shifted.clamp(-FP16_MAX, FP16_MAX).half(), offset))


def _levels(x: Tensor, mask: Tensor, bits: int, step: Tensor | float) -> tuple[Tensor, Tensor]:
    """Scale and offset [..., D], FP16: levels ``step`` standard deviations apart around the mean, within the range."""
    top = 2**bits - 1
    valid = mask.unsqueeze(-1)
    count = valid.sum(-2).clamp(min=1).float()
    clean = torch.where(valid, sanitize(x), 0.0)
    mean = clean.sum(-2) / count
    centred = torch.where(valid, clean - mean.unsqueeze(-2), 0.0)
    low = centred.masked_fill(~valid, torch.inf).amin(-2)
    high = centred.masked_fill(~valid, -torch.inf).amax(-2)
    scale = torch.minimum(step * (centred.square().sum(-2) / count).sqrt(), (high - low) / top)
    base = torch.minimum(torch.maximum(-top / 2 * scale, low), high - top * scale)
    scale16 = torch.where(high > low, scale, 0.0).clamp(0.0, FP16_MAX).half()
    offset = torch.where(scale16 > 0, base + mean, mean)
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
