"""What a packed cache may be off by: sound ones pass whatever their heads and quantiser, wrong ones at no tolerance."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch

from vkvx.format import METRIC_QUANTIZERS, QUANTILE_ALPHA, SHRINK_KEY
from vkvx.plugins.reference import quantization, shaping
from vkvx.runtime.checks.comparison import TOLERANCES
from vkvx.runtime.checks.packed import Packed, compare

HEADS, TOKENS = 2, 48
DIMS = (64, 96, 128, 256, 512)
FP16, FP32 = (TOLERANCES[dtype].cache for dtype in ("float16", "float32"))
"""Shares of the range; rounding errors of the bundle are uniform up to a third of it."""
QUANTIZERS = ("minmax", "quantile", "shrink", "lloyd", "shaped")


@cache
def metric_of(dim: int) -> torch.Tensor:
    """Few directions count, as in a model: errors of different channels can cancel."""
    factors = torch.randn(HEADS, dim, dim // 4, generator=torch.Generator().manual_seed(dim))
    return factors @ factors.mT / dim + 0.05 * torch.eye(dim)


def quantized(x: np.ndarray, bits: int, quantizer: str, metric: torch.Tensor) -> Packed:
    """What the reference makes of x [Hkv, n, D]."""
    given, mask = torch.from_numpy(x.astype(np.float32)), torch.ones(HEADS, x.shape[1], dtype=torch.bool)
    if quantizer in METRIC_QUANTIZERS:
        made = shaping.shape(given, mask, bits, metric)
        rms = shaping.shaped_rms(given, mask, made, metric)
    else:
        made = quantization.quantize(given, mask, bits, quantizer, alpha=QUANTILE_ALPHA[bits], gamma=SHRINK_KEY[bits])
        rms = quantization.residual_rms(given, mask, made)
    codes, *params = (tensor.numpy().astype(np.float64) for tensor in (*made, rms))
    return Packed(codes, *params)


@cache
def sound(
    dim: int, bits: int, quantizer: str, share: float = FP16
) -> tuple[np.ndarray, Packed, Packed, dict[str, Any]]:
    """The reference's x, a sound bundle's group, the reference's group, and options of ``compare``."""
    random = np.random.default_rng(dim)
    x = random.standard_normal((HEADS, TOKENS, dim)) * random.lognormal(0, 0.5, dim) + random.standard_normal(dim)
    off = share * float(np.ptp(x))
    metric = metric_of(dim)
    ours = quantized(x + random.uniform(-off / 3, off / 3, x.shape), bits, quantizer, metric)
    options = {"bits": bits, "quantizer": quantizer, "off": off}
    options["metric"] = metric.numpy() if quantizer in METRIC_QUANTIZERS else None
    return x, ours, quantized(x, bits, quantizer, metric), options


def failed(x: np.ndarray, ours: Packed, theirs: Packed, options: dict[str, Any]) -> set[str]:
    return {one.name for one in compare(x, ours, theirs, **options) if not one.difference <= one.tolerance}


@pytest.mark.parametrize("quantizer", QUANTIZERS)
@pytest.mark.parametrize("dim", DIMS)
def test_sound_groups_pass(dim: int, quantizer: str) -> None:
    for bits in (1, 2, 4, 8) if dim == 64 else (1, 4):
        assert failed(*sound(dim, bits, quantizer)) == set()


def test_rounding_tips_more_codes_where_heads_are_wide() -> None:
    """Which is why shares of codes tell little: sound ones of ``shaped`` differ in more places than a few flips."""
    shares = []
    for dim in (64, 512):
        _, ours, theirs, _ = sound(dim, 1, "shaped")
        shares.append(float(np.mean(ours.codes != theirs.codes)))
    assert shares[1] > 0.02
    assert shares[0] < shares[1]


def flipped(ours: Packed) -> Packed:
    """One code in twenty is another."""
    top = max(1.0, ours.codes.max())
    chosen = np.random.default_rng(1).random(ours.codes.shape) < 0.05
    return replace(ours, codes=np.where(chosen, top - ours.codes, ours.codes))


def one_channel(ours: Packed) -> Packed:
    """The codes of one channel of one head are turned round."""
    codes = ours.codes.copy()
    codes[0, :, 0] = max(1.0, codes.max()) - codes[0, :, 0]
    return replace(ours, codes=codes)


def swapped(ours: Packed) -> Packed:
    """Heads have each other's codes."""
    return replace(ours, codes=ours.codes[::-1])


def wider(ours: Packed) -> Packed:
    """Steps are a third larger, about the same middle."""
    top = max(1.0, ours.codes.max())
    return replace(ours, scale=ours.scale * 4 / 3, offset=ours.offset - ours.scale * top / 6)


def moved(ours: Packed) -> Packed:
    """All levels are half a step higher."""
    return replace(ours, offset=ours.offset + ours.scale / 2)


def not_a_number(ours: Packed) -> Packed:
    scale = ours.scale.copy()
    scale[0, 0] = np.nan
    return replace(ours, scale=scale)


def other_rms(ours: Packed) -> Packed:
    """The RMS of channels are those of their neighbours."""
    return replace(ours, rms=np.roll(ours.rms, 1, -1))  # type: ignore[arg-type]


def no_rms(ours: Packed) -> Packed:
    return replace(ours, rms=np.zeros_like(ours.rms))  # type: ignore[type-var]


WRONG: list[tuple[str, Callable[[Packed], Packed], dict[str, str]]] = [
    ("codes", flipped, {"minmax": "", "lloyd": "", "shaped": "_error"}),
    ("one channel", one_channel, {"minmax": "", "lloyd": ""}),
    ("heads", swapped, {"minmax": "", "lloyd": "_error", "shaped": "_error"}),
    ("scale", wider, {"minmax": "_params", "lloyd": "_error", "shaped": "_error"}),
    ("offset", moved, {"minmax": "_params", "lloyd": "_error", "shaped": "_error"}),
    ("NaN", not_a_number, {"minmax": "_params", "lloyd": "_error", "shaped": "_error"}),
    ("rms", other_rms, {"minmax": "_rms", "lloyd": "_rms", "shaped": "_rms"}),
    ("no rms", no_rms, {"minmax": "_rms", "lloyd": "_rms", "shaped": "_rms"}),
]


@pytest.mark.parametrize("dim", [64, 256])
@pytest.mark.parametrize("bits", [1, 4])
@pytest.mark.parametrize(("wrong", "change", "names"), WRONG, ids=[name for name, _, _ in WRONG])
def test_wrong_groups_fail(
    wrong: str, change: Callable[[Packed], Packed], names: dict[str, str], bits: int, dim: int
) -> None:
    """At 4 bits in FP32: an RMS of the errors there is about what FP16 may be off by."""
    for quantizer, name in names.items():
        x, ours, theirs, options = sound(dim, bits, quantizer, FP16 if bits == 1 else FP32)
        assert name in failed(x, change(ours), theirs, options), quantizer


@pytest.mark.parametrize(("right", "wrong"), [("lloyd", "minmax"), ("shaped", "lloyd"), ("minmax", "lloyd")])
def test_another_quantiser_fails(right: str, wrong: str) -> None:
    """Codes and levels that suit each other, and are those of another quantiser."""
    for dim in (64, 256):
        x, _, theirs, options = sound(dim, 1, right)
        assert failed(x, sound(dim, 1, wrong)[1], theirs, options) >= {"_params" if right == "minmax" else "_error"}


def test_a_constant_channel_has_its_value() -> None:
    x, ours, theirs, options = sound(64, 1, "lloyd")
    x, ours, theirs = (x.copy(), *(replace(side, offset=side.offset.copy()) for side in (ours, theirs)))
    for side in (ours, theirs):
        side.scale[0, 0], side.codes[0, :, 0], side.offset[0, 0], side.rms[0, 0] = 0, 0, 1.5, 0  # type: ignore[index]
    x[0, :, 0] = 1.5
    assert failed(x, ours, theirs, options) == set()
    ours.offset[0, 0] = 1.5 + 2 * options["off"]
    assert "" in failed(x, ours, theirs, options)
