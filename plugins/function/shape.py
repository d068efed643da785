"""The quantiser ``shaped`` (``vkvx.plugins.reference.shaping``) as ONNX nodes.

Keys and values are shaped together, as 2B rows, because most of the time of a small model goes into starting nodes.
Levels are those of ``quantize.levels``. The sweep is a Scan over blocks of channels around a Scan over the channels of
a block, so the body does not grow with the head dim. Its state is the *wish* of each channel: where the channel would
have to be for the error to be least, the others staying as they are. With M the metric, its rows divided by the
diagonal and the diagonal then 0, that is ``target + M (target - value)``. A channel's wish does not depend on its own
code, and when channel c moves, the wishes change by ``-M[:, c] * move``.

Layouts: *rows* are [2B, Hkv, g, D, n] and *channels* are [blocks, BLOCK, 2B, Hkv, g, 1, n], with n the tokens of a
group, or 1 for what a channel has one of.
"""

from __future__ import annotations

from collections.abc import Sequence

from vkvx.format import SHAPED_FLAT_STEP, SHAPED_STEP, SHAPED_STEP_SLOPE
from vkvx.plugins.function.builder import FLOAT, FLOAT16, INT64, Builder, Operand, Typed, Value
from vkvx.plugins.function.quantize import FP16_MAX, NO_STEP, Encoded, Groups, Quantizer, levels, nearest, residual
from vkvx.plugins.operator import OperatorAttributes
from vkvx.plugins.rotary import rotary_pairs

BLOCK = 16
"""Channels of a block: each move changes the wishes of a block, the moves of a block those of all channels."""


def read_metrics(b: Builder, head_dim: int, attributes: OperatorAttributes, batch: Value) -> tuple[Value, Value]:
    """Metrics of keys [B, Hkv, 1, D, D], rotated for the rows ``batch`` [B] of the call, and of values (B: 1); FP32."""
    with b.scope("metrics"):
        key, value = (b.unsqueeze(b.cast(f"{name}_metric", FLOAT), 0, 2) for name in ("key", "value"))
        rotation = b.op("Gather", "rotation", batch, axis=0)
        cosine, sine = (b.op("Gather", rotation, i, axis=1) for i in (0, 1))
        other, sign = rotary_pairs(head_dim, attributes.rotary_dim, bool(attributes.rotary_interleaved))
        sine = b.op("Mul", sine, sign)
        for axis, around in ((3, (1, 2, 4)), (4, (1, 2, 3))):
            turned = b.op("Mul", b.op("Gather", key, other, axis=axis), b.unsqueeze(sine, *around))
            key = b.op("Add", b.op("Mul", key, b.unsqueeze(cosine, *around)), turned)
        return key, value


def shape_pair(
    b: Builder, head_dim: int, pair: Sequence[tuple[Groups, Quantizer]], metrics: tuple[Value, Value]
) -> list[Encoded]:
    """Levels and codes of the groups of keys and of values."""
    return _Shaper(b, head_dim, pair, metrics).run()


def shaped_rms(b: Builder, groups: Groups, encoded: Encoded, metric: Value) -> Value:
    """FP16 [B, Hkv, g, 1, D]: the RMS of each channel's residual times one factor per group (``reference.shaping``)."""
    left = residual(b, groups, encoded)
    square = b.op("Div", b.reduce("ReduceSum", b.op("Mul", left, left), 3), groups.count)
    whole = b.reduce("ReduceSum", b.op("Mul", b.op("MatMul", left, metric), left), 3)
    whole = b.op("Div", b.reduce("ReduceSum", whole, 4), groups.count)
    diagonal = b.reduce("ReduceSum", b.op("Where", _same_channel(b, metric), metric, 0.0), 3)
    apart = b.reduce("ReduceSum", b.op("Mul", square, diagonal), 4)
    has_error = b.op("Greater", apart, 0.0)
    factor = b.op("Div", b.op("Relu", whole), b.op("Where", has_error, apart, 1.0))
    factor = b.op("Where", has_error, factor, 1.0)
    rms = b.op("Sqrt", b.op("Mul", square, factor))
    return b.cast(b.op("Min", rms, FP16_MAX), FLOAT16)


def _centred(b: Builder, groups: Groups, encoded: Encoded) -> Encoded:
    """With offsets that leave errors a mean of 0."""
    left = residual(b, groups, encoded)
    mean = b.op("Div", b.reduce("ReduceSum", left, 3), groups.count)
    offset = b.cast(encoded.offset, FLOAT)
    moved = b.op("Clip", b.op("Add", offset, mean), -FP16_MAX, FP16_MAX)
    has_step = b.op("Greater", b.cast(encoded.scale, FLOAT), 0.0)
    return Encoded(encoded.codes, encoded.scale, b.cast(b.op("Where", has_step, moved, offset), FLOAT16))


def _step(b: Builder, head_dim: int, metric: Value, bits: int) -> Operand:
    """Distance of levels in deviations, [B, Hkv, 1, 1, 1] or the same for all heads (``reference.shaping``)."""
    if bits > 1:
        return SHAPED_STEP[bits]
    diagonal = b.op("Where", _same_channel(b, metric), metric, 0.0)
    trace = b.reduce("ReduceSum", b.reduce("ReduceSum", diagonal, 4), 3)
    square = b.reduce("ReduceSum", b.reduce("ReduceSum", b.op("Mul", metric, metric), 4), 3)
    flatness = b.op("Div", b.op("Mul", trace, trace), b.op("Mul", square, float(head_dim)))
    step = b.op("Add", b.op("Mul", flatness, -SHAPED_STEP_SLOPE), SHAPED_FLAT_STEP + SHAPED_STEP_SLOPE)
    return b.op("Min", step, SHAPED_STEP[bits])


def _same_channel(b: Builder, metric: Value) -> Value:
    """Bool [D, D], true on the diagonal."""
    channel = b.arange(b.size(metric, 4))
    return b.op("Equal", b.unsqueeze(channel, 1), channel)


class _Shaper:
    """What the sweeps over one pair of keys and values share."""

    def __init__(
        self, b: Builder, head_dim: int, pair: Sequence[tuple[Groups, Quantizer]], metrics: tuple[Value, Value]
    ) -> None:
        self._b, self._dim, self._pair = b, head_dim, pair
        self._size = pair[0][0].group_size
        self._rows = b.size(pair[0][0].x, 0)
        with b.scope("shape"):
            self._target = self._both([b.transpose(groups.centred, 0, 1, 2, 4, 3) for groups, _ in pair])
            valid = [b.transpose(groups.weight, 0, 1, 2, 4, 3) for groups, _ in pair]
            self._valid = self._both(valid)  # [2B, 1, g, 1, n]
            self._tops = [quantizer.top for _, quantizer in pair]
            if self._tops[0] != self._tops[1]:  # the largest code; 0 on padding
                self._limit = self._both([b.op("Mul", v, top) for v, top in zip(valid, self._tops, strict=True)])
            self._steps = [_step(b, head_dim, m, q.bits) for m, (_, q) in zip(metrics, pair, strict=True)]
            # The metric of values is the same for all rows.
            like_key = b.op("Mul", metrics[0], 0.0)
            metric = self._both([metrics[0], b.op("Add", like_key, metrics[1])])
            same = _same_channel(b, metric)
            diagonal = b.reduce("ReduceSum", b.op("Where", same, metric, 0.0), 4)
            self._pull = b.op("Where", same, 0.0, b.op("Div", metric, diagonal))
            columns = b.reshape(self._pull, [0, 0, 1, head_dim, head_dim // BLOCK, BLOCK])
            self._columns = b.transpose(columns, 4, 0, 1, 2, 3, 5)  # [blocks, 2B, Hkv, 1, D, BLOCK]
            self._order = b.reshape(b.arange(head_dim), [-1, BLOCK])

    def _both(self, values: list[Value]) -> Value:
        return self._b.op("Concat", *values, axis=0)

    def _apart(self, x: Value) -> tuple[Value, Value]:
        return self._b.head(x, self._rows, 0), self._b.tail(x, self._rows, 0)

    def _channels(self, rows: Value, size: int) -> Value:
        blocks = self._b.reshape(rows, [0, 0, 0, self._dim // BLOCK, BLOCK, 1, size])
        return self._b.transpose(blocks, 3, 4, 0, 1, 2, 5, 6)

    def _rows_of(self, channels: Value, size: int) -> Value:
        rows = self._b.transpose(channels, 2, 3, 4, 0, 1, 5, 6)
        return self._b.reshape(rows, [0, 0, 0, self._dim, size])

    def run(self) -> list[Encoded]:
        """The nearest codes for the levels, then better ones."""
        b = self._b
        with b.scope("shape"):
            found = []
            for (groups, quantizer), step in zip(self._pair, self._steps, strict=True):
                scale, offset = levels(b, groups, quantizer, step)
                low = b.op("Sub", b.cast(offset, FLOAT), groups.mean)
                found.append((scale, offset, low, nearest(b, groups, quantizer, scale, offset)))
            scales, offsets, lows, codes = zip(*found, strict=True)
            scale = self._channels(b.cast(self._both(list(scales)), FLOAT), 1)
            low = self._channels(self._both(list(lows)), 1)
            code = self._channels(b.transpose(self._both(list(codes)), 0, 1, 2, 4, 3), self._size)
            code = self._sweep(scale, low, code)
            code = b.transpose(self._rows_of(code, self._size), 0, 1, 2, 4, 3)
            encoded = [Encoded(*values) for values in zip(self._apart(code), scales, offsets, strict=True)]
            return [_centred(b, groups, one) for (groups, _), one in zip(self._pair, encoded, strict=True)]

    def _sweep(self, scale: Value, low: Value, code: Value) -> Value:
        """The pass over the channels: new codes."""
        b = self._b
        with b.scope("sweep"):
            value = b.op("Mul", b.op("Add", low, b.op("Mul", scale, code)), self._valid)
            error = b.op("Sub", self._target, self._rows_of(value, self._size))
            wish = b.op("Add", self._target, b.op("MatMul", self._pull, error))
            # A constant channel gets code 0, and so stays where it is.
            step = b.op("Where", b.op("Greater", scale, 0.0), scale, NO_STEP)
            sequences = {
                "order": (self._order, INT64, 2),
                "columns": (self._columns, FLOAT, 6),
                "value": (value, FLOAT, 7),
                "step": (step, FLOAT, 7),
                "low": (low, FLOAT, 7),
            }
            return b.scan("blocks", (wish, FLOAT, 5), sequences, self._block)[1]

    def _block(self, b: Builder, wish: Value, block: dict[str, Value]) -> list[Typed]:
        """The channels of a block: the wishes of all channels after it, and its codes."""
        own = b.op("Gather", wish, block["order"], axis=3)
        column = b.op("Gather", block["columns"], block["order"], axis=3)
        sequences = {
            "place": (b.unsqueeze(b.arange(BLOCK), 1), INT64, 2),
            "column": (b.unsqueeze(b.transpose(column, 4, 0, 1, 2, 3), 5), FLOAT, 6),
            **{name: (block[name], FLOAT, 6) for name in ("value", "step", "low")},
        }
        _, move, code = b.scan("channels", (own, FLOAT, 5), sequences, self._channel)
        move = b.reshape(b.transpose(move, 1, 2, 3, 0, 4, 5), [0, 0, 0, BLOCK, self._size])
        wish = b.op("Sub", wish, b.op("MatMul", block["columns"], move))
        return [(wish, FLOAT, 5), (code, FLOAT, 6)]

    def _channel(self, b: Builder, own: Value, channel: dict[str, Value]) -> list[Typed]:
        """One channel: the wishes of its block after it, its move and its code."""
        step, low = channel["step"], channel["low"]
        wish = b.op("Gather", own, channel["place"], axis=3)
        code = self._bound(b, b.op("Round", b.op("Div", b.op("Sub", wish, low), step)))
        value = b.op("Mul", b.op("Add", low, b.op("Mul", step, code)), self._valid)
        move = b.op("Sub", value, channel["value"])
        own = b.op("Sub", own, b.op("Mul", channel["column"], move))
        return [(own, FLOAT, 5), (move, FLOAT, 5), (code, FLOAT, 5)]

    def _bound(self, b: Builder, code: Value) -> Value:
        """Codes within what their bits can hold, 0 on padding."""
        if self._tops[0] != self._tops[1]:
            return b.op("Min", b.op("Relu", code), self._limit)
        # Min of two large tensors takes onnxruntime's CPU provider five times as long as the two nodes.
        return b.op("Mul", b.op("Clip", code, 0.0, self._tops[0]), self._valid)
