"""What a packed cache may be off by: derived from the keys and values that the reference computed.

Both sides compute keys and values x with roundings of their own: those of the bundle are within d of the reference's.
d is what text rows of the same layer may be off by (``Tolerance.cache`` times the range). A quantiser is a function of
x with jumps, so codes and levels of two sound caches may differ in many places, and the more, the more channels a head
has: ``shaped`` makes each channel answer for those before. But what a cache holds can be held against x:

- Codes of all quantisers but ``shaped`` are the nearest ones for the levels in the cache. So each value lies within
  half a step of its code, and at most d beyond that: every value, whatever the head dim and the bits.
- Lowest and highest level of ``minmax``, ``quantile`` and ``shrink`` are order statistics, or fractions of them: they
  move by at most d when no value moves by more. FP16 rounds each side by 2^-11 of its size.
- ``lloyd`` and ``shaped`` make the sum of e . H e over the errors e of a group small (H = 1 for ``lloyd``), and may end
  in different minima. They agree if these sums do: to ``ERROR_SHARE``, as docs/format.md says, and the norm of what x
  is off by. Rounding errors of elements are independent and within d: their mean square is at most d^2 / 3, so that of
  e . H e is trace(H) d^2 / 3 for each token, which is D d^2 / 3 as H is scaled here.
- The RMS of a channel is within d of that of the errors which its own codes leave. The factor of ``shaped`` follows the
  sum of e . H e, and so is off by the norm above.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from vkvx.format import METRIC_QUANTIZERS

FP16_MAX = 65504.0
HALF_ROUNDING = 2.0**-10
"""Relative, of the roundings of two sides to FP16; each is 2^-11 at most."""
SMALLEST_HALF = 2.0**-24
"""Step of FP16 near zero."""
CODE_ROUNDING = 1e-3
"""Of a step: how far FP32 may put a value from where it is among codes (docs/format.md)."""
ERROR_SHARE = {1: 0.01, 2: 0.01, 4: 0.01, 8: 0.05}
"""By bits: how far sums of e . H e of two implementations may be apart (docs/format.md)."""
MINIMISERS = ("lloyd", *METRIC_QUANTIZERS)


@dataclass(frozen=True)
class Packed:
    """One group of one cache: codes [Hkv, n, D] of its tokens, scale and offset [Hkv, D], and the RMS of keys."""

    codes: np.ndarray
    scale: np.ndarray
    offset: np.ndarray
    rms: np.ndarray | None

    @property
    def values(self) -> np.ndarray:
        """What the codes stand for, [Hkv, n, D]."""
        return self.offset[:, None] + self.scale[:, None] * self.codes


@dataclass(frozen=True)
class Finding:
    """``difference`` must be no more than ``tolerance``; both have the unit of keys and values."""

    name: str
    difference: float
    tolerance: float
    detail: str


def compare(
    x: np.ndarray,
    ours: Packed,
    theirs: Packed,
    *,
    bits: int,
    quantizer: str,
    off: float,
    metric: np.ndarray | None = None,
) -> Iterator[Finding]:
    """Hold a group of the bundle against the reference's keys or values x [Hkv, n, D] and what it made of them.

    ``off`` is d; ``metric`` [Hkv, D, D] is H, None for quantisers without one.
    """
    x = np.clip(np.nan_to_num(x.astype(np.float64), nan=0.0), -FP16_MAX, FP16_MAX)
    top = 2**bits - 1
    if quantizer not in METRIC_QUANTIZERS:
        yield Finding("", _beyond_code(x, ours, top), off, "values beyond half a step from their codes")
    if quantizer in MINIMISERS:
        # Heads count alike, whatever the size of their metrics.
        weights = _unit(x.shape[0], x.shape[2]) if metric is None else _normalised(metric)
        sums = [float(((e @ weights) * e).sum()) for e in (x - ours.values, x - theirs.values)]
        elements = x.size
        found, expected = (float(np.sqrt(np.maximum(0.0, total) / elements)) for total in sums)
        allowed = float(np.sqrt(1 + ERROR_SHARE[bits]) * expected + off / np.sqrt(3))
        if not np.isfinite((found, expected)).all():
            found, allowed = np.inf, 0.0
        detail = f"root mean square of the errors, the reference's is {expected:.4g}"
        yield Finding("_error", found, allowed, detail)
    else:
        weights = None
        yield Finding("_params", _beyond_levels(ours, theirs, top), off, "lowest and highest levels")
    if ours.rms is not None:
        shaped = weights if quantizer in METRIC_QUANTIZERS else None
        yield Finding("_rms", _beyond_rms(x, ours, shaped, off), off, "RMS of the errors of a channel")


def _beyond_code(x: np.ndarray, ours: Packed, top: int) -> float:
    """How far a value lies at most outside of the interval of its code."""
    scale = ours.scale[:, None]
    step = np.where(scale > 0, scale, 1.0)
    place = np.clip((x - ours.offset[:, None]) / step, 0, top)
    beyond = (np.abs(place - ours.codes) - 0.5 - CODE_ROUNDING) * step
    flat = np.abs(x - ours.offset[:, None]) - HALF_ROUNDING * np.abs(ours.offset[:, None]) + ours.codes * FP16_MAX
    return _largest(np.where(scale > 0, beyond, flat))


def _beyond_levels(ours: Packed, theirs: Packed, top: int) -> float:
    ends = []
    for side in (ours, theirs):
        ends.append(np.stack([side.offset, side.offset + top * side.scale]))
    sizes = np.abs(theirs.offset) + top * theirs.scale
    return _largest(np.abs(ends[0] - ends[1]) - HALF_ROUNDING * sizes - (1 + top) * SMALLEST_HALF)


def _beyond_rms(x: np.ndarray, ours: Packed, weights: np.ndarray | None, off: float) -> float:
    assert ours.rms is not None
    errors = x - ours.values
    square = np.square(errors).mean(1)
    factor, slack = np.ones((len(x), 1)), 0.0
    if weights is not None:
        whole = np.maximum(0.0, ((errors @ weights) * errors).sum(2).mean(1))
        apart = (square * np.diagonal(weights, axis1=1, axis2=2)).sum(1)
        factor = np.sqrt(whole / np.where(apart > 0, apart, 1.0))[:, None]
        # What the norm is off by, as a share of it.
        slack = (off * np.sqrt(x.shape[2] / 3) / np.sqrt(np.where(whole > 0, whole, 1.0)))[:, None]
    expected = factor * np.sqrt(square)
    difference = np.abs(ours.rms - expected) - (HALF_ROUNDING + slack) * expected - SMALLEST_HALF
    return _largest(difference / np.where(factor > 0, factor, 1.0))


def _normalised(metric: np.ndarray) -> np.ndarray:
    """The metric of each head with a trace of D."""
    metric = metric.astype(np.float64)
    return metric / np.trace(metric, axis1=1, axis2=2)[:, None, None] * metric.shape[-1]


def _unit(heads: int, dim: int) -> np.ndarray:
    return np.broadcast_to(np.eye(dim), (heads, dim, dim))


def _largest(values: np.ndarray) -> float:
    """The largest, or 0; infinity if one is no number."""
    return float(np.nan_to_num(values, nan=np.inf).max(initial=0.0))
