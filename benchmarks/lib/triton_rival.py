"""Decode attention over packed words in Triton, as one writes it without knowing the format's use: rivals of libvkvx.

``attend`` follows what arXiv 2502.14882 says of its own: one kernel multiplies the query with packed keys, another the
weights with packed values; both unpack codes in registers, and scales and offsets are applied after the product
("post-scaling"). A softmax of torch stands between them. ``dequantize`` writes the cache as FP16, for attention that
knows no packed cache. Head dims are powers of two, tokens a multiple of 128, groups but the last are full.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

_TILE = 128
_PROGRAMS = 1056
"""Programs of the value kernel that keep a GPU of 132 multiprocessors busy."""


def _bench(call: Any, quantiles: Any) -> Any:
    return triton.testing.do_bench(call, warmup=2, rep=8, quantiles=quantiles)


def _configs(*choices: tuple[int, int]) -> list[triton.Config]:
    """Tiles a program and warps; fewer than 8 warps spill at 8 bits, and take twice as long to compile."""
    return [triton.Config({"TILES": tiles}, num_warps=warps) for tiles, warps in choices]


@triton.jit
def _key_codes(words, BITS: tl.constexpr, D: tl.constexpr):
    """Codes [128 tokens, D/32, 32] of the tile of key words that starts at `words`."""
    W: tl.constexpr = D // 32
    token, word, bit = tl.arange(0, 128), tl.arange(0, W), tl.arange(0, 32)
    codes = tl.zeros([128, W, 32], tl.int32)
    for i in tl.static_range(BITS):
        plane = BITS - 1 - i
        loaded = tl.load(words + plane * 128 * W + token[:, None] * W + word[None, :])
        codes = codes * 2 + ((loaded[:, :, None] >> bit[None, None, :]) & 1)
    return codes


@triton.jit
def _value_codes(words, BITS: tl.constexpr, D: tl.constexpr):
    """Codes [D, 4, 32 tokens] of the tile of value words that starts at `words`."""
    channel, word, bit = tl.arange(0, D), tl.arange(0, 4), tl.arange(0, 32)
    codes = tl.zeros([D, 4, 32], tl.int32)
    for i in tl.static_range(BITS):
        plane = BITS - 1 - i
        loaded = tl.load(words + plane * D * 4 + channel[:, None] * 4 + word[None, :])
        codes = codes * 2 + ((loaded[:, :, None] >> bit[None, None, :]) & 1)
    return codes


@triton.autotune(_configs((1, 8), (4, 8), (4, 16)), key=["BITS", "HEADS", "cached"], do_bench=_bench)
@triton.jit(do_not_specialize=["ratio", "tiles", "group_tiles"])
def _score_kernel(
    query,  # FP16 [B*Hkv, ratio, D]
    words,  # INT32 [B*Hkv, tiles, BITS, 128, D/32]
    group_levels,  # FP16 [B*Hkv, groups, 3, D]
    scores,  # FP32 [B*Hkv, ratio, cached]
    scale,
    ratio,
    cached,
    tiles,
    group_tiles,
    BITS: tl.constexpr,
    D: tl.constexpr,
    HEADS: tl.constexpr,
    TILES: tl.constexpr,
):
    W: tl.constexpr = D // 32
    pair = tl.program_id(0).to(tl.int64)
    token, head, d = tl.arange(0, 128), tl.arange(0, HEADS), tl.arange(0, D)
    channel = tl.arange(0, W)[:, None] * 32 + tl.arange(0, 32)[None, :]
    for i in range(TILES):
        tile = tl.program_id(1) * TILES + i
        if tile * 128 < cached:
            codes = _key_codes(words + (pair * tiles + tile) * BITS * 128 * W, BITS, D)
            levels = group_levels + (pair * tl.cdiv(tiles, group_tiles) + tile // group_tiles) * 3 * D
            target = scores + pair * ratio * cached + tile * 128 + token
            if HEADS == 1:
                q = tl.load(query + pair * D + channel).to(tl.float32) * scale
                scaled = q * tl.load(levels + channel).to(tl.float32)
                products = codes.to(tl.float32) * scaled[None, :, :]
                base = tl.sum(tl.sum(q * tl.load(levels + D + channel).to(tl.float32), 1), 0)
                tl.store(target, tl.sum(tl.sum(products, 2), 1) + base)
            else:
                known = head[:, None] < ratio
                q = tl.load(query + (pair * ratio + head[:, None]) * D + d[None, :], mask=known, other=0.0)
                q = q.to(tl.float32) * scale
                scaled = q * tl.load(levels + d).to(tl.float32)[None, :]
                keys = tl.trans(tl.reshape(codes, [128, D])).to(tl.float16)
                base = tl.sum(q * tl.load(levels + D + d).to(tl.float32)[None, :], 1)
                result = tl.dot(scaled.to(tl.float16), keys) + base[:, None]
                tl.store(target[None, :] + head[:, None] * cached, result, mask=known)


@triton.autotune(_configs((1, 8), (1, 16)), key=["BITS", "HEADS", "cached"], do_bench=_bench)
@triton.jit(do_not_specialize=["ratio", "tiles", "group_tiles", "splits"])
def _value_kernel(
    weights,  # FP32 [B*Hkv, ratio, cached]
    words,  # INT32 [B*Hkv, tiles, BITS, D, 4]
    group_levels,  # FP16 [B*Hkv, groups, 2, D]
    partial,  # FP32 [splits, B*Hkv, ratio, D]
    ratio,
    cached,
    tiles,
    group_tiles,
    splits,
    BITS: tl.constexpr,
    D: tl.constexpr,
    HEADS: tl.constexpr,
    TILES: tl.constexpr,
):
    pair, split = tl.program_id(0).to(tl.int64), tl.program_id(1)
    head, d = tl.arange(0, HEADS), tl.arange(0, D)
    token = tl.arange(0, 4)[:, None] * 32 + tl.arange(0, 32)[None, :]
    flat = tl.arange(0, 128)
    share = tl.cdiv(tl.cdiv(cached, 128), splits)
    result = tl.zeros([HEADS, D], tl.float32)
    for tile in range(split * share, tl.minimum((split + 1) * share, tl.cdiv(cached, 128))):
        codes = _value_codes(words + (pair * tiles + tile) * BITS * D * 4, BITS, D)
        levels = group_levels + (pair * tl.cdiv(tiles, group_tiles) + tile // group_tiles) * 2 * D
        scale, offset = tl.load(levels + d).to(tl.float32), tl.load(levels + D + d).to(tl.float32)
        source = weights + pair * ratio * cached + tile * 128
        if HEADS == 1:
            p = tl.load(source + token)
            products = tl.sum(tl.sum(codes.to(tl.float32) * p[None, :, :], 2), 1)
            result += (products * scale + tl.sum(tl.sum(p, 1), 0) * offset)[None, :]
        else:
            p = tl.load(source + head[:, None] * cached + flat[None, :], mask=head[:, None] < ratio, other=0.0)
            values = tl.trans(tl.reshape(codes, [D, 128])).to(tl.float16)
            # Weights are near 1/cached, where FP16 has few digits left.
            products = tl.dot((p * cached).to(tl.float16), values) / cached
            result += products * scale[None, :] + tl.sum(p, 1)[:, None] * offset[None, :]
    target = partial + ((split * tl.num_programs(0) + pair) * ratio + head[:, None]) * D + d[None, :]
    tl.store(target, result, mask=head[:, None] < ratio)


@triton.jit(do_not_specialize=["tiles", "group_tiles"])
def _dequantize_kernel(
    key_words,
    key_params,
    value_words,
    value_params,
    key,  # FP16 [B*Hkv, cached, D]
    value,
    cached,
    tiles,
    group_tiles,
    KEY_BITS: tl.constexpr,
    VALUE_BITS: tl.constexpr,
    D: tl.constexpr,
):
    pair, tile = tl.program_id(0).to(tl.int64), tl.program_id(1)
    d, token = tl.arange(0, D), tl.arange(0, 128)
    group = pair * tl.cdiv(tiles, group_tiles) + tile // group_tiles
    target = (pair * cached + tile * 128 + token[:, None]) * D + d[None, :]
    codes = _key_codes(key_words + (pair * tiles + tile) * KEY_BITS * 4 * D, KEY_BITS, D)
    scale = tl.load(key_params + group * 3 * D + d).to(tl.float32)
    offset = tl.load(key_params + group * 3 * D + D + d).to(tl.float32)
    tl.store(
        key + target, (tl.reshape(codes, [128, D]).to(tl.float32) * scale[None, :] + offset[None, :]).to(tl.float16)
    )
    codes = _value_codes(value_words + (pair * tiles + tile) * VALUE_BITS * 4 * D, VALUE_BITS, D)
    scale = tl.load(value_params + group * 2 * D + d).to(tl.float32)
    offset = tl.load(value_params + group * 2 * D + D + d).to(tl.float32)
    codes = tl.trans(tl.reshape(codes, [D, 128]))
    tl.store(value + target, (codes.to(tl.float32) * scale[None, :] + offset[None, :]).to(tl.float16))


def attend(
    query: torch.Tensor,
    visual_key: torch.Tensor,
    visual_key_params: torch.Tensor,
    visual_value: torch.Tensor,
    visual_value_params: torch.Tensor,
    *,
    cached: int,
    scale: float,
) -> torch.Tensor:
    """Attention of FP16 query [B, Hq, 1, D] over `cached` tokens of packed caches (``docs/format.md``); FP16."""
    rows, kv_heads, tiles, key_bits = visual_key.shape[:4]
    query_heads, d = query.shape[1], query.shape[3]
    pairs, ratio = rows * kv_heads, query_heads // kv_heads
    group_tiles = tiles // visual_key_params.shape[2]
    sizes: dict[str, Any] = {"D": d, "HEADS": 1 if ratio == 1 else max(16, triton.next_power_of_2(ratio))}
    scores = torch.empty(pairs, ratio, cached, device=query.device)
    _score_kernel[lambda meta: (pairs, triton.cdiv(cached, _TILE * meta["TILES"]))](
        query, visual_key, visual_key_params, scores, scale, ratio, cached, tiles, group_tiles, BITS=key_bits, **sizes
    )
    weights = scores.softmax(-1)
    splits = min(cached // _TILE, triton.cdiv(_PROGRAMS, pairs))
    partial = torch.empty(splits, pairs, ratio, d, device=query.device)
    _value_kernel[(pairs, splits)](
        *(weights, visual_value, visual_value_params, partial, ratio, cached, tiles, group_tiles, splits),
        BITS=visual_value.shape[3],
        **sizes,
    )
    return partial.sum(0).half().view(query.shape)


def dequantize(
    visual_key: torch.Tensor,
    visual_key_params: torch.Tensor,
    visual_value: torch.Tensor,
    visual_value_params: torch.Tensor,
    *,
    key: torch.Tensor,
    value: torch.Tensor,
) -> None:
    """Fill FP16 key and value [B, Hkv, cached, D] with the first `cached` tokens of packed caches."""
    rows, kv_heads, cached, d = key.shape
    tiles = visual_key.shape[2]
    _dequantize_kernel[(rows * kv_heads, cached // _TILE)](
        *(visual_key, visual_key_params, visual_value, visual_value_params, key, value, cached, tiles),
        tiles // visual_key_params.shape[2],
        KEY_BITS=visual_key.shape[3],
        VALUE_BITS=visual_value.shape[3],
        D=d,
        num_warps=8,
    )
