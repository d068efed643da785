"""Calls of the operator for tests: random inputs from a short description, and a check of any implementation's results.

NumPy only; BF16 tensors travel as float32 that holds BF16 values.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import oracle
from oracle import Attributes, ulp16

CACHES = ("visual_key", "visual_key_params", "visual_value", "visual_value_params", "text_key", "text_value")
INPUTS = (
    *("query", "key", "value", "visual_index", "text_index", "slot"),
    *(*CACHES[:4], "visual_count", *CACHES[4:], "text_count"),
)
METRIC_INPUTS = ("key_metric", "value_metric", "rotation")
"""Further inputs of calls whose quantizer is `shaped`."""
ALL_INPUTS = (*INPUTS, *METRIC_INPUTS, "window_start")
MASKS: tuple[dict[str, object], ...] = (
    {"visual_mask": "run"},
    {"visual_mask": "prefix"},
    {"sliding_window": 30},
    {"sliding_window": 3, "visual_mask": "run"},
    {"sliding_window": 50, "visual_mask": "prefix"},
    {"softcap": 2.0},
    {"softcap": 5.0, "sliding_window": 20, "visual_mask": "run"},
)
"""Attributes of layers that do not attend causally to all scores as they are."""
Arrays = dict[str, np.ndarray]


@dataclass(frozen=True)
class Dims:
    """Shapes that all calls on one cache share; float_type is that of query, key, value and text rows."""

    slots: int = 6
    query_heads: int = 4
    kv_heads: int = 2
    head_dim: int = 32
    groups: int = 4
    text_rows: int = 40
    float_type: str = "float32"


def attributes_for(key_bits: int, value_bits: int, **more: object) -> Attributes:
    """Attributes with the default alphas and shrink factors of these bits."""
    alpha = {1: 0.2, 2: 0.07, 4: 0.005, 8: 0.0, 16: 0.0}
    return replace(
        Attributes(
            key_bits=key_bits,
            value_bits=value_bits,
            quantile_alpha_key=alpha[key_bits],
            quantile_alpha_value=alpha[value_bits],
            shrink_key=0.5 if key_bits == 1 else 1.0,
            shrink_value=0.3 if value_bits == 1 else 1.0,
            scale=32**-0.5,
        ),
        **more,  # type: ignore[arg-type]
    )


def bfloat16(x: np.ndarray) -> np.ndarray:
    """float32 rounded to BF16 precision, half to even."""
    bits = x.astype(np.float32).view(np.uint32).astype(np.uint64)
    rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000
    return np.where(np.isnan(x), np.float32(np.nan), rounded.astype(np.uint32).view(np.float32))


def as_type(x: np.ndarray, float_type: str) -> np.ndarray:
    return bfloat16(x) if float_type == "bfloat16" else x.astype(float_type)


def empty_state(dims: Dims, attributes: Attributes, rng: np.random.Generator) -> Arrays:
    """Caches and counts of empty slots.  What lies past the counts is poison: NaN, and any bits in the words."""
    d, groups = dims.head_dim, dims.groups
    key_bits, value_bits = attributes.key_bits, attributes.value_bits
    if attributes.key_bits == 16:
        groups, key_bits, value_bits = 0, 1, 1
    tiles = groups * attributes.group_size // 128
    lead = (dims.slots, dims.kv_heads)

    def words(*shape: int) -> np.ndarray:
        return rng.integers(-(2**31), 2**31, (*lead, *shape)).astype(np.int32)

    def nan(dtype: str, *shape: int) -> np.ndarray:
        return np.full((*lead, *shape), np.nan, dtype)

    text_type = "float32" if dims.float_type == "bfloat16" else dims.float_type
    if attributes.text_bits == 8:
        text = {name: words(dims.text_rows, d // 4 + 1) for name in ("text_key", "text_value")}
    else:
        text = {name: nan(text_type, dims.text_rows, d) for name in ("text_key", "text_value")}
    return {
        "visual_key": words(tiles, key_bits, 128, d // 32),
        "visual_key_params": nan("float16", groups, 3, d),
        "visual_value": words(tiles, value_bits, d, 4),
        "visual_value_params": nan("float16", groups, 2, d),
        "visual_count": np.zeros((dims.slots, groups), np.int32),
        **text,
        "text_count": np.zeros(dims.slots, np.int32),
    }


def lay_out(rows: list[str], group_size: int) -> tuple[list[list[int]], list[list[int]], int]:
    """Visual and text indices of rows such as "t3 p200 _2 t1": 3 text tokens, a picture of 200, 2 of padding, 1 text.

    Also the number of positions.  A picture fills whole groups of its own; -1 marks the rest of its last group.
    """
    visual, text, longest = [], [], 1
    for row in rows:
        at, row_visual, row_text = 0, [], []
        for part in row.split():
            kind, count = part[0], int(part[1:])
            positions = list(range(at, at + count))
            at += count
            if kind == "t":
                row_text += positions
            elif kind == "p":
                row_visual += positions + [-1] * (-count % group_size)
        visual.append(row_visual)
        text.append(row_text)
        longest = max(longest, at)
    return visual, text, longest


def new_call(
    rows: list[tuple[int, str]],
    state: Arrays,
    dims: Dims,
    attributes: Attributes,
    rng: np.random.Generator,
    *,
    empty_groups: int = 0,
    spare: int = 0,
    garbage: float = 1e4,
    sharpness: float = 1.0,
) -> Arrays:
    """All inputs, for rows of (slot, layout), slot -1 for an idle row.

    `empty_groups` more groups of -1 and `spare` more text entries and positions pad every row; padding positions of
    query, key and value hold `garbage`.  `sharpness` scales the queries.
    """
    visual, text, length = lay_out([layout for _, layout in rows], attributes.group_size)
    length += spare
    entries = max(len(v) for v in visual) + empty_groups * attributes.group_size
    text_entries = max(len(t) for t in text) + spare
    visual_index = np.array([v + [-1] * (entries - len(v)) for v in visual], np.int32).reshape(len(rows), entries)
    text_index = np.array([t + [-1] * (text_entries - len(t)) for t in text], np.int32).reshape(len(rows), text_entries)
    channel = np.exp(0.7 * rng.standard_normal((dims.kv_heads, 1, dims.head_dim)))
    shift = 2 * rng.standard_normal((dims.kv_heads, 1, dims.head_dim)) * (rng.random(dims.head_dim) < 0.2)
    inputs = {}
    for name, heads in (("query", dims.query_heads), ("key", dims.kv_heads), ("value", dims.kv_heads)):
        x = rng.standard_normal((len(rows), heads, length, dims.head_dim))
        x = x * sharpness if name == "query" else x * channel + shift
        for b in range(len(rows)):
            used = [i for i in (*visual[b], *text[b]) if i >= 0]
            padding = np.setdiff1d(np.arange(length), used)
            x[b, :, padding] = garbage
        inputs[name] = as_type(x, dims.float_type)
    inputs.update(
        visual_index=visual_index, text_index=text_index, slot=np.array([slot for slot, _ in rows], np.int32), **state
    )
    inputs = {name: inputs[name] for name in INPUTS}
    if needs_metrics(attributes):
        inputs |= new_metrics(len(rows), dims, rng)
    if attributes.sliding_window:
        inputs["window_start"] = new_window_start(inputs, attributes, rng)
    return inputs


def new_window_start(inputs: Arrays, attributes: Attributes, rng: np.random.Generator) -> np.ndarray:
    """Random places where windows start, ascending along a row: at the first cached token, within, or past them all."""
    length = inputs["query"].shape[2]
    start = np.zeros((len(inputs["slot"]), 2, length), np.int32)
    for b, slot in enumerate(inputs["slot"]):
        groups = int((inputs["visual_count"][slot] > 0).sum()) if slot >= 0 else 0
        for kind, filled in enumerate((groups * attributes.group_size, int(inputs["text_count"][slot]))):
            first = rng.integers(0, filled + 1) * rng.integers(0, 2)
            start[b, kind] = np.minimum(first + np.cumsum(rng.integers(0, 3, length)), filled)
    return start


def needs_metrics(attributes: Attributes) -> bool:
    return attributes.quantizer == "shaped" and attributes.key_bits != 16


def new_metrics(rows: int, dims: Dims, rng: np.random.Generator) -> Arrays:
    """Random metrics, of mean diagonal 1 but for 0.1 more on it, and a random rotation of each row."""
    d, metrics = dims.head_dim, {}
    for name in METRIC_INPUTS[:2]:
        factor = rng.standard_normal((dims.kv_heads, d, d)) * np.exp(0.3 * rng.standard_normal((dims.kv_heads, d, 1)))
        metric = factor @ factor.transpose(0, 2, 1)
        metric /= np.trace(metric, axis1=1, axis2=2)[:, None, None] / d
        metrics[name] = (metric + 0.1 * np.eye(d)).astype(np.float16)
    angle = np.tile(rng.uniform(0, 2 * np.pi, (rows, d // 2)), 2)
    return metrics | {"rotation": np.stack([np.cos(angle), np.sin(angle)], 1).astype(np.float32)}


def metric_of(inputs: Arrays, name: str, row: int, attributes: Attributes) -> np.ndarray | None:
    """The metric [Hkv, D, D] of the `key` or `value` of a row, FP64; None if the call has none."""
    if "rotation" not in inputs:
        return None
    metric = inputs[f"{name}_metric"].astype(np.float64)
    if name == "value":
        return metric
    cosine, sine = inputs["rotation"][row].astype(np.float64)
    turned, rotation = attributes.rotary_dim or len(cosine), np.diag(cosine)
    for first in range(turned // 2):
        i, j = (2 * first, 2 * first + 1) if attributes.rotary_interleaved else (first, first + turned // 2)
        rotation[i, j], rotation[j, i] = -sine[i], sine[j]
    return rotation @ metric @ rotation.T


def same_bits(a: np.ndarray, b: np.ndarray) -> bool:
    """Equal, NaN with NaN."""
    return a.dtype == b.dtype and bool(np.array_equal(a, b, equal_nan=a.dtype.kind == "f"))


def check(inputs: Arrays, results: Arrays, attributes: Attributes, dims: Dims, slack: float = 0.0) -> Arrays:
    """Compare output and caches of one call with the oracle's; results by name, `output` among them.

    Levels within 2 FP16 ulp, codes equal unless within 1e-3 of a half-integer given the result's own levels, text rows
    exact, output to the accuracy of its type, and every byte outside of what the call appends as it was. The output may
    be off by `slack` times its largest element more: for kernels that round queries and weights to 16 bits.

    Returns:
        the state after the call: the caches of `results` and the counts.
    """
    expected = oracle.visual_kv_attention(inputs, attributes, dims.float_type)
    rounding = {"float32": 2.0**-22, "float16": 2.0**-11, "bfloat16": 2.0**-8}[dims.float_type]
    output = np.asarray(results["output"], np.float64)
    assert output.shape == inputs["query"].shape
    bound = 2.0**-22 * (1 + 4 * expected.sensitivity) + 1.01 * rounding * np.abs(expected.output)
    bound = bound + slack * np.abs(expected.output).max(initial=0.0)
    worst = np.abs(output - expected.output)
    assert np.all(worst <= bound), f"output differs by {np.max(worst / bound):.3g} x the tolerance"
    assert not output[expected.output == 0].any()

    untouched = {name: np.ones(inputs[name].shape, bool) for name in CACHES}
    tiles = attributes.group_size // 128
    for group in expected.appended:
        part = slice(group.index * tiles, (group.index + 1) * tiles)
        _check_group(group, results, attributes, part)
        for name in ("visual_key", "visual_value"):
            untouched[name][group.slot, :, part] = False
        for name in ("visual_key_params", "visual_value_params"):
            untouched[name][group.slot, :, group.index] = False
    for slot, row in expected.text_rows:
        for name in ("text_key", "text_value"):
            assert same_bits(results[name][slot, :, row], expected.caches[name][slot, :, row]), (name, slot, row)
            untouched[name][slot, :, row] = False
    for name in CACHES:
        assert results[name].shape == inputs[name].shape
        assert same_bits(results[name][untouched[name]], inputs[name][untouched[name]]), f"{name} written elsewhere"
    counts = {"visual_count": expected.visual_count, "text_count": expected.text_count}
    return {name: results[name] for name in CACHES} | counts


def _check_group(group: oracle.Group, results: Arrays, a: Attributes, tiles: slice) -> None:
    """Words, levels and key RMS of one appended group in `results`."""
    heads, count, d = group.key.shape
    everyone = np.ones(count, bool)
    for name, x, bits, alpha, gamma, unpack in (
        ("key", group.key, a.key_bits, a.quantile_alpha_key, a.shrink_key, oracle.unpack_keys),
        ("value", group.value, a.value_bits, a.quantile_alpha_value, a.shrink_value, oracle.unpack_values),
    ):
        params = results[f"visual_{name}_params"][group.slot, :, group.index]
        codes = unpack(results[f"visual_{name}"][group.slot, :, tiles])
        assert not codes[:, count:].any(), f"{name}: bits of padding are set"
        for h in range(heads):
            wanted, certain = oracle.encode(x[h], params[h, 0], params[h, 1], bits)
            assert np.array_equal(codes[h, :count][certain], wanted[certain]), name
            assert np.abs(codes[h, :count].astype(int) - wanted).max() <= 1, name
            for channel in range(d):
                level = oracle.channel_levels(x[h, :, channel], everyone, bits, a.quantizer, alpha, gamma)
                scale, offset = params[h, :2, channel].astype(np.float64)
                at = (name, h, channel)
                if level.stable:
                    assert abs(scale - level.scale) <= 2 * ulp16(level.scale) + level.slack_scale, at
                    assert abs(offset - level.offset) <= 2 * ulp16(level.offset) + level.slack_offset, at
                if name == "key":
                    deq = oracle.decode(codes[h, :count, channel], scale, offset)
                    rms = oracle.rms(x[h, :, channel], deq, everyone)
                    room = 2 * ulp16(rms) + 2.0**-22 * np.abs(x[h, :, channel]).max()
                    assert abs(float(params[h, 2, channel]) - rms) <= room, at
