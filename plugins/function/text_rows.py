"""Text rows of 8 bits as ONNX nodes: what ``vkvx.plugins.reference.text_rows`` does, to the bit.

ONNX cannot take the bits of an FP16 number for an integer or the other way round, so the scale goes through its
exponent and fraction: ``(fraction + hidden) * unit``, with ``unit`` the power of two that the exponent stands for.
"""

from __future__ import annotations

import numpy as np

from vkvx.format import TEXT_SCALE_MOST, TEXT_TOP
from vkvx.plugins.function.builder import FLOAT, FLOAT16, INT32, Builder, Value
from vkvx.plugins.function.pack import word_bytes
from vkvx.plugins.function.quantize import FP16_MAX, NO_STEP

_CODES = np.arange(256, dtype=np.uint8).astype(np.int8).astype(np.float32)
_EXPONENTS = np.arange(31)
_UNITS = (2.0 ** (np.maximum(_EXPONENTS, 1) - 25)).astype(np.float32)
_HIDDEN = np.where(_EXPONENTS > 0, 1024, 0).astype(np.float32)
_FRACTION_STEPS = 1024
_NORMAL = 2.0 ** np.arange(-14, 16, dtype=np.float32)
"""The least number of each exponent from 1 on."""


def decode(b: Builder, words: Value, head_dim: int) -> Value:
    """Words INT32 [B, Hkv, n, D/4 + 1] to FP32 [B, Hkv, n, D]."""
    codes = b.op("Slice", words, [0], [head_dim // 4], [3])
    codes = b.op("Gather", _CODES, word_bytes(b, codes), axis=0)
    codes = b.reshape(codes, [0, 0, 0, head_dim])
    bits = b.op("Gather", words, [head_dim // 4], axis=3)
    exponent = b.op("Div", bits, np.int32(_FRACTION_STEPS))
    fraction = b.cast(b.op("Sub", bits, b.op("Mul", exponent, np.int32(_FRACTION_STEPS))), FLOAT)
    fraction = b.op("Add", fraction, b.op("Gather", _HIDDEN, exponent, axis=0))
    scale = b.op("Mul", fraction, b.op("Gather", _UNITS, exponent, axis=0))
    return b.op("Mul", codes, scale)


def encode(b: Builder, x: Value, head_dim: int) -> Value:
    """FP32 [B, Hkv, n, D] to words INT32 [B, Hkv, n, D/4 + 1]."""
    x = b.op("Where", b.op("IsNaN", x), 0.0, x)
    x = b.op("Clip", x, -FP16_MAX, FP16_MAX)
    scale = b.op("Div", b.reduce("ReduceMax", b.op("Abs", x), 3), float(TEXT_TOP))
    scale = b.op("Min", b.cast(b.cast(scale, FLOAT16), FLOAT), TEXT_SCALE_MOST)
    step = b.op("Where", b.op("Greater", scale, 0.0), scale, NO_STEP)
    codes = b.op("Clip", b.op("Round", b.op("Div", x, step)), -float(TEXT_TOP), float(TEXT_TOP))
    # Three unsigned bytes and a signed one, as two half words of which the upper is signed.
    parts = b.reshape(codes, [0, 0, 0, head_dim // 4, 2, 2])
    wrapped = b.op("Mul", b.cast(b.op("Less", parts, 0.0), FLOAT), np.array([[256, 256], [256, 0]], np.float32))
    halves = b.op("Mul", b.op("Add", parts, wrapped), np.array([1, 256], np.float32))
    halves = b.cast(b.reduce("ReduceSum", halves, 5, keepdims=False), INT32)
    words = b.reduce("ReduceSum", b.op("Mul", halves, np.array([1, 1 << 16], np.int32)), 4, keepdims=False)
    at_least = b.cast(b.op("GreaterOrEqual", scale, _NORMAL), FLOAT)
    exponent = b.cast(b.reduce("ReduceSum", at_least, 3), INT32)
    fraction = b.op("Div", scale, b.op("Gather", _UNITS, exponent, axis=0))
    fraction = b.op("Sub", fraction, b.op("Gather", _HIDDEN, exponent, axis=0))
    bits = b.op("Add", b.op("Mul", exponent, np.int32(_FRACTION_STEPS)), b.cast(fraction, INT32))
    return b.op("Concat", words, bits, axis=3)
