"""The quantisers of ``vkvx.plugins.reference.quantization`` as ONNX nodes.

Groups are [B, Hkv, g, group_size, D] FP32, their statistics [B, Hkv, g, 1, D]. Over whole groups Where and Cast from
bool to FP32 are avoided: they take onnxruntime's CPU provider 4 to 40 times as long as arithmetic.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from vkvx.format import LLOYD_ITERATIONS
from vkvx.plugins.function.builder import FLOAT, FLOAT16, UINT8, Builder, Operand, Value

FP16_MAX = 65504.0
_BEYOND = 2.0**18
"""More than the distance of any two sanitised values."""
NO_STEP = 1e30
"""Divisor that turns any sanitised value into code 0."""


@dataclass(frozen=True)
class Quantizer:
    """One way to choose levels; ``vkvx.plugins.reference.quantization.levels`` documents the parameters."""

    name: str
    bits: int
    alpha: float
    gamma: float

    @property
    def top(self) -> float:
        """Largest code."""
        return float(2**self.bits - 1)


@dataclass(frozen=True)
class Groups:
    """Tokens of groups and their statistics over the valid ones."""

    x: Value  # [B, Hkv, g, group_size, D] sanitised
    weight: Value  # [B, 1, g, group_size, 1] 1 for valid tokens, else 0
    count: Value  # [B, 1, g, 1, 1] valid tokens, at least 1
    mean: Value
    centred: Value  # less the mean; 0 on padding
    beneath: Value  # the same, but on padding less than any valid value
    above: Value  # the same, but on padding more than any valid value
    low: Value
    high: Value
    group_size: int


@dataclass(frozen=True)
class Encoded:
    """Quantised groups."""

    codes: Value  # [B, Hkv, g, group_size, D] FP32, 0 on padding
    scale: Value  # FP16
    offset: Value  # FP16


def center(b: Builder, x: Value, weight: Value, group_size: int) -> Groups:
    """Sanitise groups of tokens (padding may be anything) and take their mean, minimum and maximum."""
    x = b.op("Where", b.op("IsNaN", x), 0.0, x)
    x = b.op("Clip", x, -FP16_MAX, FP16_MAX)
    count = b.op("Max", b.reduce("ReduceSum", weight, 3), 1.0)
    mean = b.op("Div", b.reduce("ReduceSum", b.op("Mul", x, weight), 3), count)
    centred = b.op("Mul", b.op("Sub", x, mean), weight)
    distance = b.op("Mul", b.op("Sub", 1.0, weight), _BEYOND)
    beneath, above = b.op("Sub", centred, distance), b.op("Add", centred, distance)
    low, high = b.reduce("ReduceMin", above, 3), b.reduce("ReduceMax", beneath, 3)
    return Groups(x, weight, count, mean, centred, beneath, above, low, high, group_size)


def levels(b: Builder, groups: Groups, quantizer: Quantizer, step: Operand | None = None) -> tuple[Value, Value]:
    """Scale and offset of each channel, FP16. ``step``: of ``shaped`` the distance of levels in deviations."""
    low, high, mean = groups.low, groups.high, groups.mean
    varies = b.op("Greater", high, low)
    if quantizer.name == "quantile":
        low, high = _quantiles(b, groups, quantizer.alpha)
    elif quantizer.name == "shrink":
        low, high = (
            b.op("Sub", b.op("Mul", b.op("Add", end, mean), float(quantizer.gamma)), mean) for end in (low, high)
        )
    elif quantizer.name == "lloyd" and quantizer.bits == 1:
        low, high = _lloyd_two_levels(b, groups)
    elif quantizer.name not in ("minmax", "lloyd") and step is None:
        raise ValueError(f"the quantizer '{quantizer.name}' has no levels here")
    scale = b.op("Div", b.op("Sub", high, low), quantizer.top)
    if step is not None:
        low, scale = _around_the_mean(b, groups, scale, quantizer.top, step)
    if quantizer.name == "lloyd" and quantizer.bits > 1:
        low, scale = _lloyd_uniform(b, groups, low, scale, quantizer.top)
    scale = b.op("Clip", b.op("Where", varies, scale, 0.0), 0.0, FP16_MAX)
    scale = b.cast(scale, FLOAT16)
    has_step = b.op("Greater", b.cast(scale, FLOAT), 0.0)
    offset = b.op("Where", has_step, b.op("Add", low, mean), mean)
    return scale, b.cast(b.op("Clip", offset, -FP16_MAX, FP16_MAX), FLOAT16)


def _indicator(b: Builder, condition: Value) -> Value:
    """FP32 1 where true, else 0. By way of UINT8: onnxruntime casts bool to FP32 ten times slower."""
    return b.cast(b.cast(condition, UINT8), FLOAT)


def _quantiles(b: Builder, groups: Groups, alpha: float) -> tuple[Value, Value]:
    """Quantiles alpha and 1 - alpha, linear between order statistics; only the tails are sorted."""
    # Two more than the rank of the quantile: its neighbour, and one for the rounding of 1 - alpha.
    tail = min(int(alpha * (groups.group_size - 1)) + 3, groups.group_size)
    ranks = b.reshape(b.op("Range", 0.0, float(tail), 1.0), [1, 1, 1, tail, 1])
    last = b.op("Sub", groups.count, 1.0)

    def pick(ordered: Value, rank: Value) -> Value:
        return b.reduce("ReduceSum", b.op("Mul", ordered, _indicator(b, b.op("Equal", ranks, rank))), 3)

    def between(below: Value, above: Value, position: Value, floor: Value) -> Value:
        return b.op("Add", below, b.op("Mul", b.op("Sub", above, below), b.op("Sub", position, floor)))

    smallest = b.top_k(groups.above, [tail], axis=3, largest=False)
    position = b.op("Mul", last, float(np.float32(alpha)))
    rank = b.op("Floor", position)
    low = between(pick(smallest, rank), pick(smallest, b.op("Min", b.op("Add", rank, 1.0), last)), position, rank)
    largest = b.top_k(groups.beneath, [tail], axis=3, largest=True)
    position = b.op("Mul", last, float(np.float32(1.0 - alpha)))
    floor = b.op("Floor", position)
    rank = b.op("Sub", last, floor)
    high = between(pick(largest, rank), pick(largest, b.op("Max", b.op("Sub", rank, 1.0), 0.0)), position, floor)
    return low, high


def _around_the_mean(b: Builder, groups: Groups, most: Value, top: float, step: Operand) -> tuple[Value, Value]:
    """Levels some standard deviations apart, but not more than ``most``, around the mean and within the range."""
    square = b.op("Div", b.reduce("ReduceSum", b.op("Mul", groups.centred, groups.centred), 3), groups.count)
    scale = b.op("Min", b.op("Mul", b.op("Sqrt", square), step), most)
    low = b.op("Max", b.op("Mul", scale, -top / 2), groups.low)
    return b.op("Min", low, b.op("Sub", groups.high, b.op("Mul", scale, top))), scale


def _lloyd_two_levels(b: Builder, groups: Groups) -> tuple[Value, Value]:
    """Lloyd's algorithm for two free levels from the mean as threshold; a side without tokens keeps the threshold."""
    total = b.reduce("ReduceSum", groups.centred, 3)
    threshold = b.op("Mul", total, 0.0)
    low = high = threshold
    for _ in range(LLOYD_ITERATIONS):
        above = _indicator(b, b.op("Greater", groups.beneath, threshold))
        count = b.reduce("ReduceSum", above, 3)
        upper = b.reduce("ReduceSum", b.op("Mul", above, groups.centred), 3)
        residual = b.op("Sub", groups.count, count)
        high = _side(b, upper, count, threshold)
        # The sums of the two sides are nearly opposite, so the difference loses nothing.
        low = _side(b, b.op("Sub", total, upper), residual, threshold)
        threshold = b.op("Mul", b.op("Add", low, high), 0.5)
    return low, high


def _side(b: Builder, total: Value, count: Value, threshold: Value) -> Value:
    mean = b.op("Div", total, b.op("Max", count, 1.0))
    return b.op("Where", b.op("Greater", count, 0.0), mean, threshold)


def _lloyd_uniform(b: Builder, groups: Groups, low: Value, scale: Value, top: float) -> tuple[Value, Value]:
    """Alternate between assigning codes and fitting scale and offset by least squares, from the min-max levels."""
    mean = b.op("Div", b.reduce("ReduceSum", groups.centred, 3), groups.count)
    for _ in range(LLOYD_ITERATIONS):
        step = b.op("Where", b.op("Greater", scale, 0.0), scale, 1.0)
        # Padding lies beneath all levels: code 0.
        code = b.op("Clip", b.op("Round", b.op("Div", b.op("Sub", groups.beneath, low), step)), 0.0, top)
        code_mean = b.op("Div", b.reduce("ReduceSum", code, 3), groups.count)
        spread = b.op("Mul", b.op("Sub", code, code_mean), groups.weight)
        variance = b.reduce("ReduceSum", b.op("Mul", spread, spread), 3)
        covariance = b.reduce("ReduceSum", b.op("Mul", spread, groups.centred), 3)
        fits = b.op("Greater", variance, 0.0)
        slope = b.op("Div", b.op("Div", covariance, groups.count), _or_one(b, fits, variance, groups.count))
        scale = b.op("Where", fits, slope, scale)
        low = b.op("Where", fits, b.op("Sub", mean, b.op("Mul", scale, code_mean)), low)
    return low, scale


def _or_one(b: Builder, condition: Value, x: Value, count: Value) -> Value:
    return b.op("Where", condition, b.op("Div", x, count), 1.0)


def nearest(b: Builder, groups: Groups, quantizer: Quantizer, scale: Value, offset: Value) -> Value:
    """Codes of the levels nearest to the tokens [B, Hkv, g, group_size, D] FP32, 0 on padding."""
    scale, offset = b.cast(scale, FLOAT), b.cast(offset, FLOAT)
    step = b.op("Where", b.op("Greater", scale, 0.0), scale, NO_STEP)
    code = b.op("Round", b.op("Div", b.op("Sub", groups.x, offset), step))
    return b.op("Mul", b.op("Clip", code, 0.0, quantizer.top), groups.weight)


def quantize(b: Builder, groups: Groups, quantizer: Quantizer) -> Encoded:
    """Levels, and for each token the nearest of them."""
    scale, offset = levels(b, groups, quantizer)
    return Encoded(nearest(b, groups, quantizer, scale, offset), scale, offset)


def residual(b: Builder, groups: Groups, encoded: Encoded) -> Value:
    """What codes leave over [B, Hkv, g, group_size, D] FP32, 0 on padding."""
    scale, offset = b.cast(encoded.scale, FLOAT), b.cast(encoded.offset, FLOAT)
    left = b.op("Sub", groups.x, b.op("Add", offset, b.op("Mul", scale, encoded.codes)))
    return b.op("Mul", left, groups.weight)


def residual_rms(b: Builder, groups: Groups, encoded: Encoded) -> Value:
    """RMS of what codes leave over in each channel, FP16."""
    left = residual(b, groups, encoded)
    rms = b.op("Sqrt", b.op("Div", b.reduce("ReduceSum", b.op("Mul", left, left), 3), groups.count))
    return b.cast(b.op("Min", rms, FP16_MAX), FLOAT16)
