"""What the indices and counts of a call mean for its rows, as shared index tensors.

Everything here depends on inputs that all layers share and on small constants, so onnxruntime's common subexpression
elimination computes it once for the whole decoder.

*Entries* are the M = Nv + Nt + 1 elements of both indices and one -1, which keeps axes from being empty. Attention and
append gather their tokens by entry. Padding entries point at a valid token of their row and are masked, so that no
NaN of a padding position, or of a cache row past the counts, enters a product.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from vkvx.plugins.function.builder import FLOAT, INT64, Builder, Operand, Value
from vkvx.plugins.operator import OperatorAttributes

FAR = 2**30
"""Position of a key that no query may see."""


@dataclass(frozen=True)
class NodeSizes:
    """Static sizes of a node."""

    query_heads: int
    kv_heads: int
    head_dim: int
    group_size: int

    @property
    def tiles(self) -> int:
        """Tiles a group."""
        return self.group_size // 128


@dataclass(frozen=True)
class CallValues:
    """Index tensors of a call, INT64. ``n`` is the longest cached text, ``g`` the most cached groups; at least 1."""

    live: Value  # [B] 1 where the row has a slot
    row: Value  # [B] cache row, 0 for idle rows
    text_count: Value  # [B], 0 for idle rows
    used_groups: Value  # [B] ("" at 16 bits)
    groups: Value  # scalar g ("" at 16 bits)
    visual_count: Value  # [B, g] ("" at 16 bits)
    visual_seen: Value  # [B, g * group_size] bool ("" at 16 bits)
    cached_groups: Value  # [B, Hkv, g] in a cache's groups of all slots and heads ("" at 16 bits)
    cached_tiles: Value  # [B, Hkv, g * tiles] the same of tiles ("" at 16 bits)
    position: Value  # [B, M] position of each entry, FAR for padding
    source: Value  # [B, M] the same, with a valid token in place of padding
    column_position: Value  # [B, g * group_size + n + M] earliest query position that sees the key
    in_window: Value  # [B, S, g * group_size + n + M] bool, the key is in the query's window ("" without one)
    text_rows: (
        Value  # [B, Hkv, n, 3] cached text rows in the cache; [B, Hkv, n] in its rows of all slots and heads at 8 bits
    )
    new_rows: Value  # [B, Hkv, M, 3] entries in key and value


def indices(b: Builder, shape: NodeSizes, outer: Value, inner: Value, rank: int = 4) -> Value:
    """Indices (outer, head, inner) for GatherND and ScatterND: [B, Hkv, ..., 3].

    outer is [B], inner [B, ...] with rank - 2 axes; rank counts the axes of the result.
    """
    heads = b.reshape(b.arange(shape.kv_heads), [1, shape.kv_heads] + [1] * (rank - 2))
    outer = b.op("Mul", b.unsqueeze(outer, *range(1, rank)), [1, 0, 0])
    inner = b.op("Mul", b.unsqueeze(inner, 1, rank - 1), [0, 0, 1])
    return b.op("Add", b.op("Add", outer, b.op("Mul", heads, [0, 1, 0])), inner)


def flat_indices(b: Builder, shape: NodeSizes, outer: Value, inner: Value, size: Value, rank: int = 3) -> Value:
    """Indices (outer, head, inner) of a cache [Bc, Hkv, size, ...] whose first three axes are made one: [B, Hkv, ...].

    outer is [B], inner [B or 1, ...] with rank - 1 axes; rank counts the axes of the result. They are for Gather, as
    GatherND has no INT32 kernel in onnxruntime's CUDA provider. To gather slots and slice them would copy whole slots.
    """
    heads = b.op("Add", b.op("Mul", b.unsqueeze(outer, 1), shape.kv_heads), b.arange(shape.kv_heads))
    return b.op("Add", b.unsqueeze(b.op("Mul", heads, size), *range(2, rank)), b.unsqueeze(inner, 1))


def read_call(b: Builder, shape: NodeSizes, attributes: OperatorAttributes) -> CallValues:
    """Nodes for ``CallValues``."""
    packed = attributes.is_packed
    with b.scope("call"):
        slot = b.cast("slot", INT64)
        live_rows = b.op("Greater", slot, -1)
        live = b.cast(live_rows, INT64)
        row = b.op("Max", slot, 0)
        text_count = b.op("Mul", b.cast(b.op("Gather", "text_count", row), INT64), live)

        padding = b.op("Min", b.unsqueeze("slot", 1), np.int32(-1))
        entry = b.cast(b.op("Concat", "visual_index", "text_index", padding, axis=1), INT64)
        valid = b.op("And", b.op("Greater", entry, -1), b.unsqueeze(live_rows, 1))
        position = b.op("Where", valid, entry, FAR)
        first = b.reduce("ReduceMin", position, 1)
        first = b.op("Where", b.op("Less", first, FAR), first, 0)
        source = b.op("Where", valid, entry, first)
        new_rows = indices(b, shape, b.arange(b.size("slot", 0)), source)

        # Rows past a count are unspecified: read the last valid one instead. Where there is none, attention drops what
        # is read. At least one row and one group are read, because not every provider can reduce an empty axis.
        longest = b.op("Max", b.op("ReduceMax", text_count, keepdims=0), 1)
        cached = b.unsqueeze(b.arange(longest), 0)
        count = b.unsqueeze(text_count, 1)
        text_row = b.op("Max", b.op("Min", cached, b.op("Sub", count, 1)), 0)
        if attributes.keeps_text:
            text_rows = indices(b, shape, row, text_row)
        else:
            text_rows = flat_indices(b, shape, row, text_row, b.size("text_key", 2))
        own = _earliest(b, position, valid, attributes.visual_mask)
        columns = [b.op("Where", b.op("Less", cached, count), -1, FAR), own]
        window = _window(b, longest, position, attributes) if attributes.sliding_window else []

        used = groups = visual_count = visual_seen = cached_groups = cached_tiles = ""
        if packed:
            counts = b.cast(b.op("Gather", "visual_count", row), INT64)
            counts = b.op("Mul", counts, b.unsqueeze(live, 1))
            used = b.reduce("ReduceSum", b.cast(b.op("Greater", counts, 0), INT64), 1, keepdims=False)
            groups = b.op("Max", b.op("ReduceMax", used, keepdims=0), 1)
            visual_count = b.head(counts, groups, 1)
            token = b.reshape(b.arange(shape.group_size), [1, 1, shape.group_size])
            visual_seen = b.op("Less", token, b.unsqueeze(visual_count, 2))
            visual_seen = b.reshape(visual_seen, [0, -1])
            columns.insert(0, b.op("Where", visual_seen, -1, FAR))
            if window:
                window.insert(0, _from_start(b, b.op("Mul", groups, shape.group_size), 0))
            capacity = b.size("visual_count", 1)
            cached_groups = flat_indices(b, shape, row, b.unsqueeze(b.arange(groups), 0), capacity)
            tiles, capacity = (b.op("Mul", x, shape.tiles) for x in (groups, capacity))
            cached_tiles = flat_indices(b, shape, row, b.unsqueeze(b.arange(tiles), 0), capacity)
        column_position = b.op("Concat", *columns, axis=1)
        in_window = b.op("Concat", *window, axis=2) if window else ""
    return CallValues(
        live, row, text_count, used, groups, visual_count, visual_seen, cached_groups, cached_tiles, position, source,
        column_position, in_window, text_rows, new_rows,
    )  # fmt: skip


def _earliest(b: Builder, position: Value, valid: Value, mask: str) -> Value:
    """Of each entry [B, M] the earliest position of the call that sees it; ``position`` are their own."""
    if mask == "causal":
        return position
    if mask == "prefix":
        return b.op("Where", valid, -1, FAR)
    # A run of visual tokens starts behind the last text token before it.
    visual = b.size("visual_index", 1)
    text = b.cast("text_index", INT64)  # padding is -1, which lies before all positions
    before = b.op("Less", b.unsqueeze(text, 1), b.unsqueeze(b.head(position, visual, 1), 2))
    last = b.op("Where", before, b.unsqueeze(text, 1), -1)
    last = b.op("Concat", last, b.unsqueeze(b.head(b.op("Sub", b.op("Mul", position, 0), 1), visual, 1), 2), axis=2)
    start = b.op("Add", b.reduce("ReduceMax", last, 2, keepdims=False), 1)
    start = b.op("Where", b.op("Less", b.head(position, visual, 1), FAR), start, FAR)
    return b.op("Concat", start, b.tail(position, visual, 1), axis=1)


def _window(b: Builder, longest: Value, position: Value, attributes: OperatorAttributes) -> list[Value]:
    """Which cached text rows and which entries lie in the window of each position: [B, S, n] and [B, S, M] bool."""
    query = b.unsqueeze(b.arange(b.size("query", 2)), 0, 2)
    # All of a prompt see each other, whatever the window.
    reach = FAR if attributes.visual_mask == "prefix" else attributes.sliding_window
    own = b.op("Less", b.op("Sub", query, b.unsqueeze(position, 1)), reach)
    return [_from_start(b, longest, 1), own]


def _from_start(b: Builder, length: Value, kind: int) -> Value:
    """Which of ``length`` cached entries (kind 0) or text rows (1) each position sees: [B, S, length] bool."""
    start = b.cast(b.op("Gather", "window_start", kind, axis=1), INT64)
    return b.op("LessOrEqual", b.unsqueeze(start, 2), b.unsqueeze(b.arange(length), 0, 1))


@dataclass(frozen=True)
class Placement:
    """Where the n appended entries of each row come from and go to.

    What does not fit repeats an entry that does, so no write leaves its slot and equal targets get equal data. When
    nothing of the call fits (``fits`` is false), all entries point at one old place, to be written back unchanged.
    """

    fits: Value  # scalar bool
    batch: Value  # [B] row of the call
    entry: Value  # [B, n] entry of that row
    row: Value  # [B] cache row
    target: Value  # [B, n] index in the cache row


def place(b: Builder, call: CallValues, used: Value, capacity: Value, entries: Operand) -> Placement:
    """Append ``entries`` entries per row behind the ``used`` [B] ones, of ``capacity`` (scalar)."""
    room = b.op("Mul", b.op("Sub", capacity, used), call.live)
    has_room = b.op("Greater", room, 0)
    donor = b.op("ArgMax", b.cast(room, FLOAT), keepdims=0)
    fits = b.op("Gather", has_room, donor)
    batch = b.op("Where", has_room, b.arange(b.size("slot", 0)), donor)
    entry = b.op("Min", b.unsqueeze(b.arange(entries), 0), b.op("Sub", b.unsqueeze(room, 1), 1))
    entry = b.op("Max", entry, 0)
    target = b.op("Add", b.unsqueeze(b.op("Gather", used, batch), 1), entry)
    target = b.op("Min", target, b.op("Sub", capacity, 1))
    return Placement(fits, batch, entry, b.op("Gather", call.row, batch), target)
