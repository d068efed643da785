"""A second, slow implementation of the packed format and of the operator, to test the fast ones against.

Written from the text of the format in NumPy float64 with plain loops; it shares no code with the package and imports
nothing of it.  One channel, one bit, one query position at a time: easy to check against the text by eye.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import ml_dtypes
import numpy as np

TILE = 128
WORD = 32
TYPES: dict[str, Any] = {"float32": np.float32, "float16": np.float16, "bfloat16": ml_dtypes.bfloat16}
LARGEST = 65504.0  # largest finite FP16
FP32_STEP = 2.0**-24
LLOYD_ROUNDS = 8


def ulp16(x: Any) -> np.ndarray:
    """Distance between neighbouring FP16 numbers at x, float64."""
    exponent = np.floor(np.log2(np.maximum(np.abs(np.asarray(x, np.float64)), 2.0**-14)))
    return 2.0 ** (exponent - 10)


# --- quantisers -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Levels:
    """Levels of one channel of one group: value = offset + scale * code.

    `slack_scale` and `slack_offset` say how far FP32 rounding alone can move the unrounded levels (an element that sits
    on a decision boundary to within FP32 rounding may fall on either side of it); `stable` is False where such an
    element could also send a few-level iteration to another fixed point.
    """

    scale: np.float16
    offset: np.float16
    slack_scale: float
    slack_offset: float
    stable: bool


def sanitise(x: np.ndarray) -> np.ndarray:
    """NaN -> 0, everything else clamped to +-65504; float64."""
    x = np.asarray(x, dtype=np.float64)
    return np.clip(np.where(np.isnan(x), 0.0, x), -LARGEST, LARGEST)


def quantile(sorted_values: np.ndarray, alpha: float) -> tuple[float, float]:
    """Linear interpolation at alpha * (n - 1); returns the value and what FP32 rounding of the position can change."""
    position = alpha * (len(sorted_values) - 1)
    below = min(math.floor(position), len(sorted_values) - 1)
    above = min(below + 1, len(sorted_values) - 1)
    value = sorted_values[below] + (sorted_values[above] - sorted_values[below]) * (position - below)
    # the rounded position may also fall into the next interval
    low, high = max(below - 1, 0), min(above + 1, len(sorted_values) - 1)
    steepest = max(
        sorted_values[above] - sorted_values[below],
        (sorted_values[below] - sorted_values[low]) if position - below < 1e-3 else 0.0,
        (sorted_values[high] - sorted_values[above]) if above - position < 1e-3 else 0.0,
    )
    return float(value), float(steepest) * 4 * FP32_STEP * max(position, 1.0)


def channel_levels(x: np.ndarray, valid: np.ndarray, bits: int, quantizer: str, alpha: float, gamma: float) -> Levels:
    """Levels of one channel, from its values x [n] and which of them are tokens, valid [n]."""
    raw = sanitise(x)[np.asarray(valid, dtype=bool)]
    if len(raw) == 0:
        return Levels(np.float16(0), np.float16(0), 0.0, 0.0, True)
    mean = float(np.sum(raw) / len(raw))
    if raw.min() == raw.max():
        return Levels(np.float16(0), np.float16(raw[0]), 0.0, 0.0, True)
    magnitude = float(np.abs(raw).max())
    blur = 8 * FP32_STEP * magnitude  # FP32 error of a value less the mean, with room for the sum's
    steps = 2**bits - 1
    c = raw - mean
    stable = True
    slack_low = slack_scale = 0.0

    if quantizer == "minmax":
        low, scale = c.min(), (c.max() - c.min()) / steps
    elif quantizer == "shrink":
        low, high = gamma * raw.min() - mean, gamma * raw.max() - mean
        scale = (high - low) / steps
    elif quantizer == "quantile":
        ordered = np.sort(c)
        low, slack_low = quantile(ordered, alpha)
        high, slack_high = quantile(ordered, 1 - alpha)
        scale = (high - low) / steps
        slack_scale = (slack_low + slack_high) / steps
    elif quantizer == "lloyd" and bits == 1:
        threshold = 0.0
        low = high = 0.0
        for _ in range(LLOYD_ROUNDS):
            stable = stable and bool(np.all(np.abs(c - threshold) > blur))
            above, below = c[c > threshold], c[c <= threshold]
            low = below.mean() if len(below) else threshold
            high = above.mean() if len(above) else threshold
            threshold = (low + high) / 2
        scale = high - low
    elif quantizer == "lloyd":
        low, scale = c.min(), (c.max() - c.min()) / steps
        for _ in range(LLOYD_ROUNDS):
            ratio = (c - low) / scale
            code = np.clip(np.rint(ratio), 0, steps)
            inside = (ratio > 0) & (ratio < steps)
            doubtful = int(np.sum(inside & (np.abs(ratio - np.floor(ratio) - 0.5) < blur / scale)))
            centre = code.mean()
            variance = np.mean((code - centre) ** 2)
            if variance == 0:
                stable = stable and doubtful == 0
                break
            # one code that changes by 1 moves the least-squares line by so much, and later rounds move it further
            moved = 4 * doubtful * scale * steps / (2 * len(c) * variance)
            slack_scale = max(slack_scale, moved)
            slack_low = max(slack_low, 4 * doubtful * scale / len(c) + moved * centre)
            scale = np.mean((code - centre) * c) / variance
            low = c.mean() - scale * centre
        stable = stable and slack_scale <= 0.02 * scale
    else:
        raise ValueError(quantizer)

    uncertain = slack_scale  # of levels that FP32 may take from another pair of elements or other codes
    slack_scale += blur / steps
    slack_low += blur
    scale16 = np.float16(min(max(float(scale), 0.0), LARGEST))
    offset16 = np.float16(min(max(float(low) + mean, -LARGEST), LARGEST))
    if scale16 == 0:
        offset16 = np.float16(mean)
    # a scale that may round to 0 or not takes the offset with it, from the lowest level to the mean
    if 0 < scale <= 2**-23 + 2 * slack_scale or (scale <= 0 and uncertain > 0):
        stable = False
    return Levels(scale16, offset16, slack_scale, slack_low, stable)


def encode(x: Any, scale: Any, offset: Any, bits: int) -> tuple[np.ndarray, np.ndarray]:
    """Codes, and whether each is certain: not within 1e-3 of a half-integer.  Shapes broadcast; levels are FP16."""
    x = sanitise(x)
    scale, offset = np.asarray(scale, np.float64), np.asarray(offset, np.float64)
    ratio = np.where(scale == 0, 0.0, (x - offset) / np.where(scale == 0, 1.0, scale))
    codes = np.clip(np.rint(ratio), 0, 2**bits - 1).astype(np.uint8)
    certain = np.abs(ratio - np.floor(ratio) - 0.5) > 1e-3
    return codes, certain


def decode(codes: Any, scale: Any, offset: Any) -> np.ndarray:
    return np.asarray(offset, np.float64) + np.asarray(scale, np.float64) * np.asarray(codes, np.float64)


def rms(x: np.ndarray, dequantised: np.ndarray, valid: np.ndarray) -> float:
    """Root mean square of x - dequantised over the valid tokens of one channel, 0 with none; at most 65504."""
    if not np.any(valid):
        return 0.0
    error = (sanitise(x) - dequantised)[np.asarray(valid, dtype=bool)]
    return min(float(np.sqrt(np.mean(error**2))), LARGEST)


# --- bit planes -------------------------------------------------------------------------------------------------------


def _signed(words: np.ndarray) -> np.ndarray:
    return words.astype(np.uint32).view(np.int32)


def pack_keys(codes: np.ndarray, bits: int) -> np.ndarray:
    """codes [..., n, D] -> INT32 [..., n/128, bits, 128, D/32]: bit i of word w is bit p of code(t, 32w + i)."""
    *lead, n, d = codes.shape
    out = np.zeros((*lead, n // TILE, bits, TILE, d // WORD), np.uint64)
    for tile in range(n // TILE):
        block = codes[..., tile * TILE : (tile + 1) * TILE, :].astype(np.uint64)
        for p in range(bits):
            for w in range(d // WORD):
                for i in range(WORD):
                    bit = (block[..., WORD * w + i] >> np.uint64(p)) & np.uint64(1)
                    out[..., tile, p, :, w] |= bit << np.uint64(i)
    return _signed(out)


def pack_values(codes: np.ndarray, bits: int) -> np.ndarray:
    """codes [..., n, D] -> INT32 [..., n/128, bits, D, 4]: bit i of word w is bit p of code(32w + i, d)."""
    *lead, n, d = codes.shape
    out = np.zeros((*lead, n // TILE, bits, d, TILE // WORD), np.uint64)
    for tile in range(n // TILE):
        for p in range(bits):
            for w in range(TILE // WORD):
                for i in range(WORD):
                    token = codes[..., tile * TILE + WORD * w + i, :].astype(np.uint64)
                    out[..., tile, p, :, w] |= ((token >> np.uint64(p)) & np.uint64(1)) << np.uint64(i)
    return _signed(out)


def unpack_keys(words: np.ndarray) -> np.ndarray:
    """INT32 [..., n/128, bits, 128, D/32] -> codes [..., n, D]."""
    *lead, tiles, bits, _, d_words = words.shape
    unsigned = np.ascontiguousarray(words).view(np.uint32)
    out = np.zeros((*lead, tiles * TILE, d_words * WORD), np.uint8)
    for tile in range(tiles):
        rows = slice(tile * TILE, (tile + 1) * TILE)
        for p in range(bits):
            for w in range(d_words):
                for i in range(WORD):
                    bit = (unsigned[..., tile, p, :, w] >> np.uint32(i)) & np.uint32(1)
                    out[..., rows, WORD * w + i] |= (bit << np.uint32(p)).astype(np.uint8)
    return out


def unpack_values(words: np.ndarray) -> np.ndarray:
    """INT32 [..., n/128, bits, D, 4] -> codes [..., n, D]."""
    *lead, tiles, bits, d, _ = words.shape
    unsigned = np.ascontiguousarray(words).view(np.uint32)
    out = np.zeros((*lead, tiles * TILE, d), np.uint8)
    for tile in range(tiles):
        for p in range(bits):
            for w in range(TILE // WORD):
                for i in range(WORD):
                    bit = (unsigned[..., tile, p, :, w] >> np.uint32(i)) & np.uint32(1)
                    out[..., tile * TILE + WORD * w + i, :] |= (bit << np.uint32(p)).astype(np.uint8)
    return out


# --- text rows of 8 bits ----------------------------------------------------------------------------------------------


def pack_row(x: np.ndarray) -> np.ndarray:
    """Keys or values [D] of a token to INT32 [D/4 + 1]: a byte a code, then the bits of the FP16 scale."""
    clean = sanitise(x).astype(np.float32)
    scale = np.float16(min(np.float16(np.abs(clean).max() / np.float32(127)), np.float16(515.5)))
    words = []
    for w in range(len(x) // 4):
        word = 0
        for j in range(4):
            code = 0 if scale == 0 else int(np.clip(np.rint(clean[4 * w + j] / np.float32(scale)), -127, 127))
            word |= (code & 0xFF) << 8 * j
        words.append(word)
    return _signed(np.array([*words, int(scale.view(np.uint16))], np.uint64))


def unpack_row(words: np.ndarray, float_type: str) -> np.ndarray:
    """INT32 [D/4 + 1] to what attention reads, numbers of the model's type, float64 [D]."""
    scale = np.uint16(int(words[-1]) & 0xFFFF).view(np.float16)
    found = []
    for word in words[:-1]:
        for j in range(4):
            byte = int(word) >> 8 * j & 0xFF
            found.append(byte - 256 if byte > 127 else byte)
    return (np.array(found, np.float64) * float(scale)).astype(TYPES[float_type]).astype(np.float64)


def cached_rows(rows: np.ndarray, attributes: Attributes, float_type: str) -> np.ndarray:
    """Text rows [n, D or D/4 + 1] as attention reads them, float64 [n, D]."""
    if attributes.text_bits == 16:
        return np.asarray(rows, np.float64)
    return np.array([unpack_row(row, float_type) for row in rows]).reshape(len(rows), 4 * (rows.shape[1] - 1))


def auto_group_size(tokens_per_picture: int | None) -> int:
    """Group size of `auto`: whole tiles, as few groups of at most 8 tiles as hold a picture, made equally long."""
    if tokens_per_picture is None:
        return 256
    tiles = -(-tokens_per_picture // TILE)
    groups = -(-tiles // 8)
    return TILE * -(-tiles // groups)


# --- the operator -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Attributes:
    """The operator's attributes, by the names of its definition."""

    key_bits: int = 1
    value_bits: int = 1
    group_size: int = 128
    quantizer: str = "lloyd"
    quantile_alpha_key: float = 0.2
    quantile_alpha_value: float = 0.2
    shrink_key: float = 0.5
    shrink_value: float = 0.3
    score_correction: str = "expected"
    tau: float = 3.0
    correction_limit: float = 3.0
    scale: float = 0.125
    rotary_dim: int = 0
    rotary_interleaved: int = 0
    softcap: float = 0.0
    sliding_window: int = 0
    visual_mask: str = "causal"
    text_bits: int = 16


@dataclass(frozen=True)
class Group:
    """The values of one group that a call appends: what the packed words and the levels must stand for."""

    row: int
    slot: int
    index: int  # group of the slot
    key: np.ndarray  # [Hkv, count, D]
    value: np.ndarray


@dataclass(frozen=True)
class Result:
    output: np.ndarray  # [B, Hq, S, D] float64
    sensitivity: np.ndarray  # [B, Hq, S, 1]: times a relative error of the products in the scores: error of the output
    caches: dict[str, np.ndarray]  # quantised content of the groups in `appended` by the oracle's own levels
    visual_count: np.ndarray
    text_count: np.ndarray
    appended: list[Group]
    text_rows: list[tuple[int, int]]  # (slot, row) written


def corrected(scores: list[np.ndarray], rests: list[float], attributes: Attributes) -> list[np.ndarray]:
    """Scores of the cached visual tokens, one array per group; rests: t of each group."""
    if attributes.score_correction == "none" or not scores:
        return scores
    if attributes.score_correction == "expected":
        return [s + t / (1 + t / attributes.correction_limit) for s, t in zip(scores, rests, strict=True)]
    if attributes.score_correction == "affine":
        everything = np.concatenate(scores)
        low, high = everything.min(), everything.max()
        slope = max((high - attributes.tau - low) / (high - low), 0.0) if high > low else 0.0
        return [low + slope * (s - low) for s in scores]
    raise ValueError(attributes.score_correction)


def sees_own(query: int, key: int, text: list[int], visual: list[int], attributes: Attributes) -> bool:
    """Whether a position of a call sees another one of it; the positions of its text and visual tokens are given."""
    if attributes.visual_mask == "prefix":
        return True
    in_window = attributes.sliding_window == 0 or query - key < attributes.sliding_window
    one_run = query in visual and key in visual and not any(query < t < key for t in text)
    return in_window and (key <= query or (attributes.visual_mask == "run" and one_run))


def visual_kv_attention(inputs: dict[str, np.ndarray], attributes: Attributes, float_type: str) -> Result:
    """The whole operator.  inputs: its tensors by name, as NumPy (BF16 widened to float32); none is changed.

    float_type: of the model, "float32", "float16" or "bfloat16".
    """
    a = attributes
    query = np.asarray(inputs["query"], np.float64)
    new_key, new_value = np.asarray(inputs["key"], np.float64), np.asarray(inputs["value"], np.float64)
    batch, query_heads = query.shape[:2]
    kv_heads = new_key.shape[1]
    caches = {
        name: np.array(inputs[name])
        for name in ("visual_key", "visual_key_params", "visual_value", "visual_value_params", "text_key", "text_value")
    }
    visual_count, text_count = np.array(inputs["visual_count"]), np.array(inputs["text_count"])
    capacity_groups, capacity_text = visual_count.shape[1], inputs["text_key"].shape[2]
    output = np.zeros(query.shape)
    sensitivity = np.zeros((*query.shape[:3], 1))
    appended: list[Group] = []
    text_rows: list[tuple[int, int]] = []

    for b in range(batch):
        slot = int(inputs["slot"][b])
        if slot < 0:
            continue
        visual_index = [int(i) for i in inputs["visual_index"][b]]
        text_index = [int(i) for i in inputs["text_index"][b]]
        visual_positions = [i for i in visual_index if i >= 0]
        text_positions = [i for i in text_index if i >= 0]
        new_positions = sorted(visual_positions + text_positions)
        cached_groups = int(np.sum(inputs["visual_count"][slot] != 0))
        cached_text = int(inputs["text_count"][slot])

        for h in range(kv_heads):
            keys, values, rms_squared = _cached_visual(inputs, attributes, slot, h, cached_groups)
            text_key = cached_rows(inputs["text_key"][slot, h, :cached_text], a, float_type)
            text_value = cached_rows(inputs["text_value"][slot, h, :cached_text], a, float_type)
            share = query_heads // kv_heads
            for hq in range(h * share, (h + 1) * share):
                for s in new_positions:
                    q = query[b, hq, s]
                    first_visual, first_text = inputs["window_start"][b, :, s] if a.sliding_window else (0, 0)
                    rests = [0.5 * a.scale**2 * float(np.sum(q**2 * r)) for r in rms_squared]
                    visual_scores = corrected([a.scale * (k @ q) for k in keys], rests, a)
                    seen = [i for i in new_positions if sees_own(s, i, text_positions, visual_positions, a)]
                    starts = [max(int(first_visual) - g * a.group_size, 0) for g in range(len(keys))]
                    scores = np.concatenate(
                        [
                            *(part[start:] for part, start in zip(visual_scores, starts, strict=True)),
                            a.scale * (text_key[first_text:] @ q),
                            a.scale * (new_key[b, h, seen] @ q),
                        ]
                    )
                    if a.softcap:
                        scores = a.softcap * np.tanh(scores / a.softcap)
                    attended = np.concatenate(
                        [
                            *(part[start:] for part, start in zip(values, starts, strict=True)),
                            text_value[first_text:],
                            new_value[b, h, seen],
                        ]
                    )
                    weights = np.exp(scores - scores.max())
                    output[b, hq, s] = (weights / weights.sum()) @ attended
                    products = np.concatenate([*keys, text_key, new_key[b, h, seen]])
                    sensitivity[b, hq, s] = a.scale * (np.abs(products) @ np.abs(q)).max() * np.abs(attended).max()

        if a.key_bits == 16:
            stored = new_positions
        else:
            stored = text_positions
            for g in range(len(visual_index) // a.group_size):
                group = [i for i in visual_index[g * a.group_size : (g + 1) * a.group_size] if i >= 0]
                if not group or cached_groups + g >= capacity_groups:
                    continue
                target = cached_groups + g
                visual_count[slot, target] = len(group)
                appended.append(Group(b, slot, target, new_key[b][:, group], new_value[b][:, group]))
                _store(caches, appended[-1], attributes)
        for j, position in enumerate(stored):
            row = cached_text + j
            if row < capacity_text:
                for name in ("key", "value"):
                    x = inputs[name][b, :, position]
                    stored_row = x if a.text_bits == 16 else np.stack([pack_row(head) for head in x])
                    caches[f"text_{name}"][slot, :, row] = stored_row
                text_count[slot] = row + 1
                text_rows.append((slot, row))
    return Result(output, sensitivity, caches, visual_count, text_count, appended, text_rows)


def _cached_visual(
    inputs: dict[str, Any], attributes: Attributes, slot: int, h: int, groups: int
) -> tuple[list[np.ndarray], list[np.ndarray], list[np.ndarray]]:
    """Dequantised keys and values [count, D] and squared key RMS [D] of each cached group of one KV head."""
    keys, values, rms_squared = [], [], []
    tiles = attributes.group_size // TILE
    for g in range(groups):
        count = int(inputs["visual_count"][slot, g])
        part = slice(g * tiles, (g + 1) * tiles)
        key_codes = unpack_keys(inputs["visual_key"][slot, h, part])[:count]
        value_codes = unpack_values(inputs["visual_value"][slot, h, part])[:count]
        key_params = np.asarray(inputs["visual_key_params"][slot, h, g], np.float64)
        value_params = np.asarray(inputs["visual_value_params"][slot, h, g], np.float64)
        keys.append(decode(key_codes, key_params[0], key_params[1]))
        values.append(decode(value_codes, value_params[0], value_params[1]))
        rms_squared.append(key_params[2] ** 2)
    return keys, values, rms_squared


def _store(caches: dict[str, np.ndarray], group: Group, a: Attributes) -> None:
    """Quantises one appended group and writes words and levels, zero bits for its padding."""
    tiles = a.group_size // TILE
    part = slice(group.index * tiles, (group.index + 1) * tiles)
    heads, count, d = group.key.shape
    everyone = np.ones(count, dtype=bool)
    for h in range(heads):
        key_codes = np.zeros((a.group_size, d), np.uint8)
        value_codes = np.zeros((a.group_size, d), np.uint8)
        for channel in range(d):
            x = group.key[h, :, channel]
            level = channel_levels(x, everyone, a.key_bits, a.quantizer, a.quantile_alpha_key, a.shrink_key)
            key_codes[:count, channel], _ = encode(x, level.scale, level.offset, a.key_bits)
            error = rms(x, decode(key_codes[:count, channel], level.scale, level.offset), everyone)
            caches["visual_key_params"][group.slot, h, group.index, :, channel] = (level.scale, level.offset, error)
            x = group.value[h, :, channel]
            level = channel_levels(x, everyone, a.value_bits, a.quantizer, a.quantile_alpha_value, a.shrink_value)
            value_codes[:count, channel], _ = encode(x, level.scale, level.offset, a.value_bits)
            caches["visual_value_params"][group.slot, h, group.index, :, channel] = (level.scale, level.offset)
        caches["visual_key"][group.slot, h, part] = pack_keys(key_codes, a.key_bits)
        caches["visual_value"][group.slot, h, part] = pack_values(value_codes, a.value_bits)
