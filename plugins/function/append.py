"""Append of a call's tokens: text rows as they are or of 8 bits, visual tokens quantised and packed.

Writes are ScatterND nodes on the whole caches, which onnxruntime does in place when the same buffer is bound to a
cache's input and output. What they write lies past the counts of the rows, or equals what is there, so it does not
matter whether another node reads a cache before or after.
"""

from __future__ import annotations

from onnx import helper

from vkvx.format import TILE, WORD_BITS, text_words
from vkvx.plugins.function.builder import FLOAT, FLOAT16, INT32, INT64, Builder, Typed, Value
from vkvx.plugins.function.call import FAR, CallValues, NodeSizes, flat_indices, indices, place
from vkvx.plugins.function.pack import bit_planes, pack_keys, pack_values
from vkvx.plugins.function.quantize import Quantizer, center, quantize, residual_rms
from vkvx.plugins.function.shape import read_metrics, shape_pair, shaped_rms
from vkvx.plugins.function.text_rows import encode
from vkvx.plugins.operator import OperatorAttributes


def append_text(b: Builder, shape: NodeSizes, attributes: OperatorAttributes, call: CallValues, dtype: int) -> None:
    """Add the text tokens (at 16 bits all tokens, in ascending position) to the text rows."""
    with b.scope("append_text"):
        if attributes.is_packed:
            source = b.tail(call.source, b.size("visual_index", 1), 1)
            source = b.op("Slice", source, [0], [-1], [1])
        else:
            source = _in_order(b, call)
        entries = b.size(source, 1)
        capacity = b.size("text_key", 2)
        placement = place(b, call, call.text_count, capacity, entries)
        source = b.op("Gather", source, placement.batch, axis=0)
        source = b.op("GatherElements", source, placement.entry, axis=1)
        source_rows = indices(b, shape, placement.batch, source)
        target_rows = indices(b, shape, placement.row, placement.target)
        # New or old rows are chosen by index: Where has no FP16 kernel, and onnxruntime would cast the whole cache.
        old_first = b.op("Mul", b.op("Sub", 1, b.cast(placement.fits, INT64)), entries)
        choice = b.op("Add", b.arange(entries), old_first)
        for cache, new in (("text_key", "key"), ("text_value", "value")):
            new_rows = b.op("GatherND", new, source_rows)
            if attributes.keeps_text:
                old_rows = b.op("GatherND", cache, target_rows)
            else:
                new_rows = encode(b, new_rows if dtype == FLOAT else b.cast(new_rows, FLOAT), shape.head_dim)
                flat = flat_indices(b, shape, placement.row, placement.target, capacity)
                old_rows = b.gather_flat(cache, flat, [text_words(shape.head_dim)])
            rows = b.op("Gather", b.op("Concat", new_rows, old_rows, axis=2), choice, axis=2)
            b.add("ScatterND", [cache, target_rows, rows], [f"present_{cache}"])


def _in_order(b: Builder, call: CallValues) -> Value:
    """Positions of a row's tokens [B, M - 1], ascending, then those of padding replaced by the first one."""
    entries = b.op("Sub", b.size(call.position, 1), 1)
    position = b.top_k(call.position, b.unsqueeze(entries, 0), axis=1, largest=False)
    first = b.reduce("ReduceMin", call.source, 1)
    return b.op("Where", b.op("Less", position, FAR), position, first)


_UPDATES = ("tiles", "groups", "visual_key", "visual_key_params", "visual_value", "visual_value_params")


def append_visual(b: Builder, shape: NodeSizes, attributes: OperatorAttributes, call: CallValues, dtype: int) -> None:
    """Quantise the visual tokens and add them as new groups.

    The quantiser is most of the nodes. An If skips it in calls without pictures: on a small model that takes 0.2 ms a
    layer from a decode step (Lloyd's quantiser; a third of the node). The branches give indices and updates only, so
    that no cache passes through the If.
    """
    with b.scope("append_visual"):
        has_visual = b.op("Greater", b.size("visual_index", 1), 0)
        then, otherwise = b.branch(), b.branch()
        with b.scope("groups"):
            updates = _quantized_updates(then, shape, attributes, call, dtype)
        with b.scope("none"):
            nothing = _no_updates(otherwise, shape, attributes)
        results = {name: f"append_visual/{name}" for name in _UPDATES}
        branches = {"then_branch": then.graph("quantize", updates), "else_branch": otherwise.graph("skip", nothing)}
        b.add("If", [has_visual], list(results.values()), **branches)
        for cache in ("visual_key", "visual_value"):
            params = f"{cache}_params"
            b.add("ScatterND", [cache, results["tiles"], results[cache]], [f"present_{cache}"])
            b.add("ScatterND", [params, results["groups"], results[params]], [f"present_{params}"])


def _no_updates(b: Builder, shape: NodeSizes, attributes: OperatorAttributes) -> list[Typed]:
    """Empty tensors of the types and ranks of ``_quantized_updates``."""
    heads, tiles, dim = shape.kv_heads, shape.tiles, shape.head_dim

    def empty(elem_type: int, *dims: int) -> Typed:
        value = helper.make_tensor("value", elem_type, [1], [0])
        return b.op("ConstantOfShape", list(dims), value=value), elem_type, len(dims)

    return [
        empty(INT64, 0, heads, 0, tiles, 3),
        empty(INT64, 0, heads, 0, 3),
        empty(INT32, 0, heads, 0, tiles, attributes.key_bits, TILE, dim // WORD_BITS),
        empty(FLOAT16, 0, heads, 0, 3, dim),
        empty(INT32, 0, heads, 0, tiles, attributes.value_bits, dim, TILE // WORD_BITS),
        empty(FLOAT16, 0, heads, 0, 2, dim),
    ]


def _quantized_updates(
    b: Builder, shape: NodeSizes, attributes: OperatorAttributes, call: CallValues, dtype: int
) -> list[Typed]:
    """Where to write tiles and groups, and what: (value, type, rank), in the order of ``_UPDATES``."""
    size, dim, capacity = shape.group_size, shape.head_dim, b.size("visual_count", 1)
    index = b.reshape(b.cast("visual_index", INT64), [0, -1, size])
    placement = place(b, call, call.used_groups, capacity, b.size(index, 1))
    group = b.op("Mul", b.unsqueeze(placement.entry, 2), [0, 1])
    index = b.op("GatherND", index, b.op("Add", b.op("Mul", b.unsqueeze(placement.batch, 1, 2), [1, 0]), group))
    weight = b.unsqueeze(b.cast(b.op("Greater", index, -1), FLOAT), 1, 4)
    tokens = indices(b, shape, placement.batch, b.op("Max", index, 0), rank=5)

    first_tile = b.unsqueeze(b.op("Mul", placement.target, shape.tiles), 2)
    tiles = b.op("Add", first_tile, b.reshape(b.arange(shape.tiles), [1, 1, shape.tiles]))
    # What to write back when nothing fits: the first target.
    row = b.op("Slice", placement.row, [0], [1])
    first = [b.op("Slice", x, [0, 0], [1, 1]) for x in (placement.target, tiles)]
    old_group = flat_indices(b, shape, row, first[0], capacity)
    old_tiles = flat_indices(b, shape, row, first[1], b.op("Mul", capacity, shape.tiles), rank=4)
    outputs = [
        (indices(b, shape, placement.row, tiles, rank=5), INT64, 5),
        (indices(b, shape, placement.row, placement.target), INT64, 4),
    ]
    a = attributes
    pair = []
    for name, quantizer in (
        ("key", Quantizer(a.quantizer, a.key_bits, a.quantile_alpha_key, a.shrink_key)),
        ("value", Quantizer(a.quantizer, a.value_bits, a.quantile_alpha_value, a.shrink_value)),
    ):
        with b.scope(name):
            x = b.op("GatherND", name, tokens)
            pair.append((center(b, x if dtype == FLOAT else b.cast(x, FLOAT), weight, size), quantizer))
    if a.needs_metrics:
        metrics = read_metrics(b, shape.head_dim, attributes, placement.batch)
        key, value = shape_pair(b, shape.head_dim, pair, metrics)
        rms = shaped_rms(b, pair[0][0], key, metrics[0])
    else:
        key, value = (quantize(b, groups, quantizer) for groups, quantizer in pair)
        rms = residual_rms(b, pair[0][0], key)
    for name, encoded, bits, pack, more in (
        ("key", key, a.key_bits, pack_keys, [rms]),
        ("value", value, a.value_bits, pack_values, []),
    ):
        with b.scope(name):
            words = pack(b, shape, bit_planes(b, encoded.codes, bits))
            tail = [bits, TILE, dim // WORD_BITS] if name == "key" else [bits, dim, TILE // WORD_BITS]
            old = b.gather_flat(f"visual_{name}", old_tiles, tail)
            outputs.append((b.op("Where", placement.fits, words, old), INT32, 7))
            params = b.op("Concat", encoded.scale, encoded.offset, *more, axis=3)
            old = b.cast(b.gather_flat(f"visual_{name}_params", old_group, [2 + len(more), dim]), FLOAT)
            params = b.op("Where", placement.fits, b.cast(params, FLOAT), old)
            outputs.append((b.cast(params, FLOAT16), FLOAT16, 5))
    return outputs
