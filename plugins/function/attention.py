"""Attention of a call's tokens over the cached ones and over themselves. FP32 throughout."""

from __future__ import annotations

import numpy as np

from vkvx.format import text_words
from vkvx.plugins.function.builder import FLOAT, FLOAT16, Builder, Value
from vkvx.plugins.function.call import CallValues, NodeSizes
from vkvx.plugins.function.quantize import FP16_MAX
from vkvx.plugins.function.text_rows import decode
from vkvx.plugins.function.visual import VisualCache
from vkvx.plugins.operator import OperatorAttributes

MASKED = -1e30
"""Added to the score of what must not be attended to; finite, so that no row of scores gives NaN."""


def attend(
    b: Builder,
    shape: NodeSizes,
    attributes: OperatorAttributes,
    call: CallValues,
    visual: VisualCache | None,
    dtype: int,
) -> Value:
    """Attention output [B, Hq, S, D] in the model's type ``dtype``, 0 at padding positions.

    Queries of one KV head are rows of one matrix: R = Hq/Hkv * S of them.
    """
    with b.scope("query"):
        query = b.op("Mul", _float(b, "query", dtype), float(attributes.scale))
        query = b.reshape(query, [0, shape.kv_heads, -1, shape.head_dim])
        positions = b.unsqueeze(b.arange(b.size("query", 2)), 0, 2)
        seen = b.op("LessOrEqual", b.unsqueeze(call.column_position, 1), positions)
        if attributes.sliding_window:
            seen = b.op("And", seen, call.in_window)
        bias = b.unsqueeze(b.op("Where", seen, 0.0, MASKED), 1)
        is_token = b.op("Equal", b.unsqueeze(call.position, 1), positions)
        is_token = b.reduce("ReduceSum", b.cast(is_token, FLOAT), 2)
        is_token = b.unsqueeze(b.op("Greater", is_token, 0.0), 1)
    with b.scope("scores"):
        scores = b.matmul_transposed(query, _rows(b, shape, attributes, call, "key", dtype), 4)
        if visual:
            scores = b.op("Concat", visual.scores(b, query), scores, axis=3)
        scores = b.reshape(scores, [0, shape.query_heads, -1, 0])
        if attributes.softcap:
            bound = float(attributes.softcap)
            scores = b.op("Mul", b.op("Tanh", b.op("Div", scores, bound)), bound)
        weights = b.op("Softmax", b.op("Add", scores, bias), axis=-1)
        weights = b.reshape(weights, [0, shape.kv_heads, -1, 0])
    with b.scope("output"):
        rows = _rows(b, shape, attributes, call, "value", dtype)
        if visual:
            cached = b.op("Mul", call.groups, shape.group_size)
            output = b.op("MatMul", b.tail(weights, cached, 3), rows)
            output = b.op("Add", output, visual.output(b, b.head(weights, cached, 3)))
        else:
            output = b.op("MatMul", weights, rows)
        output = b.reshape(output, [0, shape.query_heads, -1, shape.head_dim])
        output = b.op("Where", is_token, output, 0.0)
        if dtype == FLOAT16:
            # A mean of levels can lie a little beyond the largest FP16 number.
            output = b.op("Clip", output, -FP16_MAX, FP16_MAX)
        return output if dtype == FLOAT else b.cast(output, dtype)


def _float(b: Builder, x: Value, dtype: int) -> Value:
    return x if dtype == FLOAT else b.cast(x, FLOAT)


def _rows(
    b: Builder, shape: NodeSizes, attributes: OperatorAttributes, call: CallValues, new: Value, dtype: int
) -> Value:
    """Cached text rows, then the call's tokens by entry: [B, Hkv, n + M, D] FP32. ``new`` is ``key`` or ``value``."""
    cache, dim = f"text_{new}", shape.head_dim
    # Where there is no cached text, the row read is unspecified: it must not get in, not even as 0 * NaN.
    has_text = b.unsqueeze(b.op("Greater", call.text_count, 0), 1, 2, 3)
    if attributes.keeps_text:
        cached = _float(b, b.op("GatherND", cache, call.text_rows), dtype)
        cached = b.op("Where", has_text, cached, 0.0)
    else:
        words = b.gather_flat(cache, call.text_rows, [text_words(dim)])
        cached = decode(b, b.op("Where", has_text, words, np.int32(0)), dim)
        cached = cached if dtype == FLOAT else b.cast(b.cast(cached, dtype), FLOAT)
    return b.op("Concat", cached, _float(b, b.op("GatherND", new, call.new_rows), dtype), axis=2)
