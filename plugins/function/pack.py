"""Packing of codes into the words of the packed format, and unpacking to bits."""

from __future__ import annotations

import numpy as np

from vkvx.format import TILE, WORD_BITS
from vkvx.plugins.function.builder import INT32, UINT8, UINT32, Builder, Value
from vkvx.plugins.function.call import NodeSizes

_BYTE_BITS = ((np.arange(256)[:, None] >> np.arange(8)) & 1).astype(np.float32)


def unpack(b: Builder, words: Value) -> Value:
    """INT32 [..., n] to FP32 0 and 1 [..., n, 4, 8], least significant bit first.

    By a table of all bytes. In onnxruntime's CPU provider, bit by bit takes 1.3 to 1.8 times as long with shifts,
    which the CUDA provider lacks, and 10 to 12 times with INT64 Div and Mod (``python -m benchmarks unpack``). As
    UINT32, division is a shift also where the top bit is set; Cast to UINT8 keeps the low byte.
    """
    return b.op("Gather", _BYTE_BITS, word_bytes(b, words), axis=0)


def word_bytes(b: Builder, words: Value) -> Value:
    """INT32 [..., n] to their bytes, INT32 [..., n, 4] of 0 to 255, the lowest first."""
    shifted = b.op("Div", b.unsqueeze(b.cast(words, UINT32), -1), np.array([1, 2**8, 2**16, 2**24], np.uint32))
    return b.cast(b.cast(shifted, UINT8), INT32)


def bit_planes(b: Builder, codes: Value, bits: int) -> list[Value]:
    """Bit p of FP32 codes, FP32 0 and 1, p ascending."""
    planes, rest = [], codes
    for plane in range(bits - 1, 0, -1):
        bit = b.op("Floor", b.op("Mul", rest, 2.0**-plane))
        rest = b.op("Sub", rest, b.op("Mul", bit, 2.0**plane))
        planes.append(bit)
    return [rest, *reversed(planes)]


def pack_keys(b: Builder, shape: NodeSizes, planes: list[Value]) -> Value:
    """Planes of bits [B, Hkv, g, group_size, D] FP32 to INT32 words [B, Hkv, g, tiles, bits, 128, D/32]."""
    bits, dim = len(planes), shape.head_dim
    weights = _half_word_weights(dim)
    halves = [b.reshape(b.op("MatMul", plane, weights), [0, 0, -1, 1, TILE, dim // 16]) for plane in planes]
    words = _join_halves(b, b.reshape(_concat(b, halves, 3), [0, 0, 0, bits, TILE * dim // WORD_BITS, 2]))
    return b.reshape(words, [0, 0, -1, shape.tiles, bits, TILE, dim // WORD_BITS])


def pack_values(b: Builder, shape: NodeSizes, planes: list[Value]) -> Value:
    """Planes of bits [B, Hkv, g, group_size, D] FP32 to INT32 words [B, Hkv, g, tiles, bits, D, 4]."""
    bits, dim = len(planes), shape.head_dim
    weights = np.ascontiguousarray(_half_word_weights(TILE).T)
    tiles = [b.reshape(plane, [0, 0, -1, 1, TILE, dim]) for plane in planes]
    halves = _concat(b, [b.op("MatMul", weights, tile) for tile in tiles], 3)
    words = _join_halves(
        b, b.reshape(b.transpose(halves, 0, 1, 2, 3, 5, 4), [0, 0, 0, bits, dim * TILE // WORD_BITS, 2])
    )
    return b.reshape(words, [0, 0, -1, shape.tiles, bits, dim, TILE // WORD_BITS])


def _half_word_weights(n: int) -> np.ndarray:
    """[n, n/16]: n bits times this are the n/16 half words they make, the upper half of a word being signed.

    16 bits are exact in FP32, and also where a provider multiplies in TF32.
    """
    weights = np.kron(np.eye(n // 16), 2.0 ** np.arange(16)[:, None])
    weights[31::32] *= -1.0
    return weights.astype(np.float32)


def _join_halves(b: Builder, halves: Value) -> Value:
    """FP32 half words [..., n, 2] (rank 6) to INT32 words [..., n]."""
    return b.reduce("ReduceSum", b.op("Mul", b.cast(halves, INT32), np.array([1, 2**16], np.int32)), 5, keepdims=False)


def _concat(b: Builder, values: list[Value], axis: int) -> Value:
    return values[0] if len(values) == 1 else b.op("Concat", *values, axis=axis)
