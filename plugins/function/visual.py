"""Scores and outputs of the cached visual tokens, from bit planes.

Codes are unpacked to FP32 planes of 0 and 1 and never dequantised: a key's scale and the weight 2^p of plane p go into
the query, a value's into the output. The planes of a key lie beside each other in the contracted axis, those of a
value in the output axis.
"""

from __future__ import annotations

import numpy as np

from vkvx.format import TILE, WORD_BITS
from vkvx.plugins.function.builder import FLOAT, Builder, Value
from vkvx.plugins.function.call import CallValues, NodeSizes
from vkvx.plugins.function.pack import unpack
from vkvx.plugins.operator import OperatorAttributes

_UNSEEN = 1e30


class VisualCache:
    """The cached visual tokens of a call's rows: g groups per row, R queries per KV head."""

    def __init__(self, b: Builder, shape: NodeSizes, attributes: OperatorAttributes, call: CallValues) -> None:
        self._shape, self._attributes, self._call = shape, attributes, call
        heads, size, dim = shape.kv_heads, shape.group_size, shape.head_dim
        with b.scope("visual_key"):
            bits = attributes.key_bits
            self._key_scale, self._key_offset, self._key_rms = self._params(b, "visual_key_params", 3)
            words = b.gather_flat("visual_key", call.cached_tiles, [bits, TILE, dim // WORD_BITS])
            if bits > 1:
                words = b.transpose(words, 0, 1, 2, 4, 3, 5)
            # [B, Hkv, g, group_size, bits * D]
            self._key_planes = b.reshape(unpack(b, words), [0, heads, -1, size, bits * dim])
        with b.scope("visual_value"):
            bits = attributes.value_bits
            self._value_scale, self._value_offset = self._params(b, "visual_value_params", 2)
            words = b.gather_flat("visual_value", call.cached_tiles, [bits, dim, TILE // WORD_BITS])
            words = b.reshape(words, [0, heads, -1, shape.tiles, bits * dim, 4])
            words = b.transpose(words, 0, 1, 2, 4, 3, 5)
            # [B, Hkv, g, bits * D, group_size]
            self._value_planes = b.reshape(unpack(b, words), [0, heads, -1, bits * dim, size])

    def _params(self, b: Builder, name: Value, kinds: int) -> list[Value]:
        """Each kind as [B, Hkv, g, D] FP32; 0 for empty groups, whose parameters may be anything."""
        call = self._call
        params = b.cast(b.gather_flat(name, call.cached_groups, [kinds, self._shape.head_dim]), FLOAT)
        filled = b.unsqueeze(b.op("Greater", call.visual_count, 0), 1, 3, 4)
        params = b.op("Where", filled, params, 0.0)
        return [b.op("Gather", params, kind, axis=3) for kind in range(kinds)]

    def scores(self, b: Builder, query: Value) -> Value:
        """Corrected scores [B, Hkv, R, g * group_size] of the scaled queries [B, Hkv, R, D]."""
        shape, attributes = self._shape, self._attributes
        bits = attributes.key_bits
        scale = _plane_scales(b, self._key_scale, bits)
        planes = b.op("Mul", b.unsqueeze(query, 2, 4), scale)
        planes = b.reshape(planes, [0, 0, 0, 0, bits * shape.head_dim])
        scores = b.matmul_transposed(planes, self._key_planes, 5)
        base = b.matmul_transposed(self._key_offset, query, 4)
        if attributes.score_correction == "expected":
            base = b.op("Add", base, self._expected(b, query))
        scores = b.op("Add", scores, b.unsqueeze(base, 4))
        scores = b.reshape(b.transpose(scores, 0, 1, 3, 2, 4), self._flat_groups(b, query))
        return self._affine(b, scores) if attributes.score_correction == "affine" else scores

    def _flat_groups(self, b: Builder, query: Value) -> Value:
        """The shape [B (kept), Hkv, R, g * group_size], explicit because g may be 0."""
        rows = b.unsqueeze(b.size(query, 2), 0)
        columns = b.unsqueeze(b.op("Mul", self._call.groups, self._shape.group_size), 0)
        return b.op("Concat", [0, self._shape.kv_heads], rows, columns, axis=0)

    def _expected(self, b: Builder, query: Value) -> Value:
        """t / (1 + t / limit) [B, Hkv, g, R], where 2t is the variance of the score's rest given the codes."""
        variance = b.matmul_transposed(b.op("Mul", self._key_rms, self._key_rms), b.op("Mul", query, query), 4)
        excess = b.op("Mul", variance, 0.5)
        damping = b.op("Add", b.op("Div", excess, float(self._attributes.correction_limit)), 1.0)
        return b.op("Div", excess, damping)

    def _affine(self, b: Builder, scores: Value) -> Value:
        """Map [min, max] of each row's seen scores to [min, max - tau]; a row with one value keeps it."""
        unseen = b.unsqueeze(b.op("Where", self._call.visual_seen, 0.0, _UNSEEN), 1, 2)
        low = b.reduce("ReduceMin", b.op("Add", scores, unseen), 3)
        high = b.reduce("ReduceMax", b.op("Sub", scores, unseen), 3)
        spans = b.op("Greater", high, low)
        low = b.op("Where", spans, low, 0.0)
        span = b.op("Where", spans, b.op("Sub", high, low), 1.0)
        mapped = b.op("Sub", b.op("Sub", high, float(self._attributes.tau)), low)
        slope = b.op("Where", spans, b.op("Relu", b.op("Div", mapped, span)), 1.0)
        return b.op("Add", b.op("Mul", b.op("Sub", scores, low), slope), low)

    def output(self, b: Builder, weights: Value) -> Value:
        """Weighted sum of the values [B, Hkv, R, D]; weights are [B, Hkv, R, g * group_size]."""
        shape, bits = self._shape, self._attributes.value_bits
        by_group = b.op(
            "Concat", [0, shape.kv_heads], b.unsqueeze(b.size(weights, 2), 0), b.unsqueeze(self._call.groups, 0),
            [shape.group_size], axis=0,
        )  # fmt: skip
        weights = b.transpose(b.reshape(weights, by_group), 0, 1, 3, 2, 4)
        total = b.reduce("ReduceSum", weights, 4)
        planes = b.matmul_transposed(weights, self._value_planes, 5)
        planes = b.reshape(planes, [0, 0, 0, 0, bits, shape.head_dim])
        planes = b.op("Mul", planes, _plane_scales(b, self._value_scale, bits))
        output = b.reduce("ReduceSum", planes, 4, keepdims=False)
        output = b.op("Add", output, b.op("Mul", total, b.unsqueeze(self._value_offset, 3)))
        return b.reduce("ReduceSum", output, 2, keepdims=False)


def _plane_scales(b: Builder, scale: Value, bits: int) -> Value:
    """Scale [B, Hkv, g, D] times the weight of each plane: [B, Hkv, g, 1, bits, D]."""
    scale = b.unsqueeze(scale, 3, 4)
    return scale if bits == 1 else b.op("Mul", scale, 2.0 ** np.arange(bits, dtype=np.float32)[:, None])
