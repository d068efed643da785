"""The quantiser ``shaped`` against a slow NumPy version, and what it promises."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from oracle import ulp16
from torch import Tensor

from vkvx.plugins.reference import quantization, shaping
from vkvx.plugins.reference.quantization import Quantized

BITS = (1, 2, 4, 8)
SEEDS = st.integers(0, 2**32 - 1)


def few(examples: int) -> settings:
    return settings(max_examples=examples, deadline=None, derandomize=True)


def random_metric(rng: np.random.Generator, d: int, *lead: int) -> np.ndarray:
    """Symmetric, of a few strong directions, mean diagonal 1, and a floor; FP16 numbers as FP32."""
    root = rng.standard_normal((*lead, d, d)) * np.exp(-np.arange(d) / (d / 6))
    metric = root @ np.swapaxes(root, -1, -2)
    metric /= np.trace(metric, axis1=-2, axis2=-1)[..., None, None] / d
    return (metric + 0.1 * np.eye(d)).astype(np.float16).astype(np.float32)


def sample(rng: np.random.Generator, *shape: int) -> np.ndarray:
    return (rng.standard_normal(shape) * np.exp(0.7 * rng.standard_normal(shape[-1])) + 2).astype(np.float32)


def error(x: np.ndarray, count: int, codes: np.ndarray, scale: np.ndarray, offset: np.ndarray, metric: np.ndarray):
    """Sum of e . H e over the tokens of one group, float64."""
    e = x[:count].astype(np.float64) - (offset.astype(np.float64) + scale.astype(np.float64) * codes[:count])
    return float(np.sum((e @ metric.astype(np.float64)) * e))


def slow(x: np.ndarray, count: int, bits: int, metric: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Codes, scale and offset of one group x [n, D], written from the text of the format, in float64."""
    x, top, h = x[:count].astype(np.float64), 2**bits - 1, metric.astype(np.float64)
    low, high, mean = x.min(0), x.max(0), x.mean(0)
    flat = np.trace(h) ** 2 / (len(h) * np.sum(h**2))
    step = {1: min(2.3, 1.6 + 5 * (1 - flat)), 2: 1.0, 4: 0.33, 8: 1.0}[bits]
    scale = np.minimum(step * x.std(0), (high - low) / top)
    offset = np.clip(mean - scale * top / 2, low, high - top * scale)
    scale, offset = scale.astype(np.float16).astype(np.float64), offset.astype(np.float16).astype(np.float64)

    def nearest(wish: np.ndarray, c: int) -> np.ndarray:
        return np.clip(np.rint((wish - offset[c]) / scale[c]), 0, top)

    codes = np.stack([nearest(x[:, c], c) for c in range(x.shape[1])], 1)
    for token in range(count):
        for c in range(x.shape[1]):
            errors = x[token] - (offset + scale * codes[token])
            errors[c] = 0
            codes[token, c] = nearest(x[token, c] + h[c] @ errors / h[c, c], c)
    offset = offset + (x - (offset + scale * codes)).mean(0)
    return codes, scale, offset.astype(np.float16).astype(np.float64)


def run(x: np.ndarray, mask: Tensor, bits: int, metric: np.ndarray) -> Quantized:
    return shaping.shape(torch.from_numpy(x), mask, bits, torch.from_numpy(metric))


@pytest.mark.parametrize("bits", BITS)
@given(SEEDS, st.integers(8, 128), st.sampled_from((32, 64)))
@few(4)
def test_agrees_with_the_slow_version(bits: int, seed: int, count: int, d: int) -> None:
    rng = np.random.default_rng(seed)
    x, metric = sample(rng, 128, d), random_metric(rng, d)
    got = run(x, torch.arange(128) < count, bits, metric)
    codes, scale, offset = (t.numpy() for t in got)
    wanted, slow_scale, slow_offset = slow(x, count, bits, metric)
    mine = error(x, count, codes, scale, offset, metric)
    theirs = error(x, count, wanted, slow_scale, slow_offset, metric)
    # A code that rounding tips changes those of later channels of its token: equal in what counts, nearly so in codes.
    assert abs(mine - theirs) <= 0.02 * theirs
    assert np.mean(codes[:count] != wanted) <= {1: 0.01, 2: 0.02, 4: 0.1, 8: 0.5}[bits]
    assert np.all(np.abs(scale - slow_scale) <= ulp16(slow_scale))
    # Offsets follow the codes.
    other = slow_scale * np.abs((codes[:count].astype(float) - wanted).mean(0))
    assert np.all(np.abs(offset - slow_offset) <= 2 * ulp16(slow_offset) + other)
    assert not codes[count:].any()


@pytest.mark.parametrize("bits", BITS)
def test_shapes_the_error_away_from_where_it_counts(bits: int) -> None:
    """Less e . H e than the nearest of the same levels leave, at the price of plain distance.

    The error is a parabola in what one channel stands for, so the nearest level to its lowest point is the best there
    is while the others stay: no step of the pass adds to the error, and the best offsets do not either. Of all codes
    the nearest have the least plain distance.
    """
    rng = np.random.default_rng(bits)
    x, metric = sample(rng, 640, 64), random_metric(rng, 64)
    mask = torch.arange(640) < 576
    got = run(x, mask, bits, metric)
    h, numbers = torch.from_numpy(metric), torch.from_numpy(x)
    levels = shaping._levels(numbers, mask, bits, shaping.level_distance(h, bits))
    plain = Quantized(quantization.encode(numbers, *levels, bits), *levels)
    shaped, nearest = (error(x, 576, *(t.numpy() for t in q), metric) for q in (got, plain))
    assert shaped < nearest
    apart = np.eye(64, dtype=np.float32)
    same_levels = Quantized(got.codes, *levels)
    distances = [error(x, 576, *(t.numpy() for t in q), apart) for q in (same_levels, plain)]
    assert distances[0] > distances[1]


@pytest.mark.parametrize(("shape", "flatness"), [("plain", 1.0), ("one direction", 1 / 32), ("half", 0.5)])
def test_distance_of_levels(shape: str, flatness: float) -> None:
    """At 1 bit it follows the flatness of the metric, whatever its size; elsewhere it is fixed."""
    h = torch.eye(32)
    if shape == "one direction":
        h = torch.ones(32, 32)
    elif shape == "half":
        h[16:] = 0
    for size in (1.0, 300.0):
        found = float(shaping.level_distance(size * h, 1))
        assert found == pytest.approx(min(2.3, 1.6 + 5 * (1 - flatness)), rel=1e-6)
    assert [float(shaping.level_distance(h, bits)) for bits in (2, 4, 8)] == pytest.approx([1.0, 0.33, 1.0])


@pytest.mark.parametrize("bits", BITS)
def test_a_metric_of_plain_distance_leaves_the_nearest_levels(bits: int) -> None:
    rng = np.random.default_rng(9)
    x, mask = sample(rng, 256, 32), torch.arange(256) < 200
    got = run(x, mask, bits, np.eye(32, dtype=np.float32))
    levels = shaping._levels(torch.from_numpy(x), mask, bits, {1: 1.6, 2: 1.0, 4: 0.33, 8: 1.0}[bits])
    nearest = quantization.encode(torch.from_numpy(x), *levels, bits)
    assert torch.equal(got.codes[:200], nearest[:200])


@pytest.mark.parametrize("bits", BITS)
def test_the_mean_of_a_group_stays(bits: int) -> None:
    """Attention without preference sees it; the numbers are skewed, so that nearest levels have another."""
    rng = np.random.default_rng(bits)
    x, mask = rng.exponential(1, (256, 32)).astype(np.float32), torch.arange(256) < 250
    got = run(x, mask, bits, random_metric(rng, 32))
    mean = quantization.decode(*got)[:250].mean(0).numpy()
    # The offset is rounded to FP16.
    assert np.all(np.abs(mean - x[:250].mean(0)) <= ulp16(got.offset.float().numpy()))


@pytest.mark.parametrize("bits", BITS)
def test_two_values_are_exact(bits: int) -> None:
    """Levels do not leave the range: with few tokens the standard deviation would have them beyond."""
    x = np.tile(np.array([[-3.0, 8.0], [4.0, 0.5]], np.float32), (64, 16))
    got = run(x, torch.ones(128, dtype=torch.bool), bits, random_metric(np.random.default_rng(0), 32))
    found = quantization.decode(*got).numpy()
    assert np.abs(found - x).max() <= (2**bits - 1) * ulp16(x).max()


@given(SEEDS, st.sampled_from(BITS))
@few(12)
def test_padding_and_company_change_nothing(seed: int, bits: int) -> None:
    rng = np.random.default_rng(seed)
    x, metric = sample(rng, 2, 3, 2, 256, 32), random_metric(rng, 32, 2, 3, 1)
    mask = (torch.from_numpy(rng.integers(1, 257, (2, 1, 2, 1))) > torch.arange(256)).expand(2, 3, 2, 256)
    dirty = np.where(mask.numpy()[..., None], x, np.float32(np.nan))
    together, other = (run(data, mask, bits, metric) for data in (x, dirty))
    for a, b in zip(together, other, strict=True):
        assert torch.equal(a, b)
    assert not together.codes[~mask].any()
    for at in np.ndindex(2, 3, 2):
        alone = run(x[at], mask[at], bits, metric[at[0], at[1], 0])
        count = int(mask[at].sum())
        h = metric[at[0], at[1], 0]
        whole, part = (
            error(x[at], count, *(t.numpy() for t in q), h) for q in (Quantized(*(t[at] for t in together)), alone)
        )
        assert abs(whole - part) <= 0.01 * max(whole, part)


@pytest.mark.parametrize("bits", BITS)
def test_degenerate_groups(bits: int) -> None:
    rng = np.random.default_rng(3)
    metric = random_metric(rng, 32)
    x = np.tile(rng.standard_normal(32).astype(np.float16).astype(np.float32), (128, 1))
    for count in (1, 128):
        mask = torch.arange(128) < count
        got = run(x, mask, bits, metric)
        assert not got.scale.any()
        assert not got.codes.any()
        assert torch.equal(got.offset.float(), torch.from_numpy(x[0]))
        assert not shaping.shaped_rms(torch.from_numpy(x), mask, got, torch.from_numpy(metric)).any()
    nothing = run(np.full((128, 32), np.nan, np.float32), torch.zeros(128, dtype=torch.bool), bits, metric)
    assert not any(t.any() for t in nothing)
    wild = rng.choice([np.nan, np.inf, -np.inf, 65504, -3e38, 0, 1e-8], (128, 32)).astype(np.float32)
    everyone = torch.ones(128, dtype=torch.bool)
    got = run(wild, everyone, bits, metric)
    rms = shaping.shaped_rms(torch.from_numpy(wild), everyone, got, torch.from_numpy(metric))
    assert all(torch.isfinite(t.float()).all() for t in (*got, rms))


def test_rms_makes_the_expected_square_of_a_score_right() -> None:
    rng = np.random.default_rng(5)
    x, metric = sample(rng, 256, 64), random_metric(rng, 64)
    mask = torch.arange(256) < 250
    got = run(x, mask, 1, metric)
    rms = shaping.shaped_rms(torch.from_numpy(x), mask, got, torch.from_numpy(metric)).double().numpy()
    codes, scale, offset = (t.numpy() for t in got)
    mean = error(x, 250, codes, scale, offset, metric) / 250
    assert np.isclose(np.sum(np.diag(metric) * rms**2), mean, rtol=2e-3)
    diagonal = np.diag(np.diag(metric)).astype(np.float32)
    plain = shaping.shaped_rms(torch.from_numpy(x), mask, got, torch.from_numpy(diagonal))
    want = quantization.residual_rms(torch.from_numpy(x), mask, got)
    assert np.all(np.abs(plain.double().numpy() - want.double().numpy()) <= ulp16(want.numpy()))


def test_rotation_of_a_metric_is_that_of_the_queries() -> None:
    rng = np.random.default_rng(1)
    d, angle = 64, torch.from_numpy(rng.uniform(0, 6, (3, 32))).float()
    cosine, sine = angle.cos().repeat(1, 2), angle.sin().repeat(1, 2)
    metric = torch.from_numpy(random_metric(rng, d, 3))
    q = torch.from_numpy(rng.standard_normal((3, d))).float()
    # R^T x, the embedding turned back
    back = q * cosine + torch.cat([q[:, d // 2 :], -q[:, : d // 2]], 1) * sine
    turned = shaping.rotate(metric, cosine, sine)
    ours, theirs = ((v.unsqueeze(1) @ m @ v.unsqueeze(2)).flatten() for v, m in ((q, turned), (back, metric)))
    assert torch.allclose(ours, theirs, rtol=1e-4)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_gpu_does_as_well() -> None:
    rng = np.random.default_rng(2)
    x, metric = sample(rng, 640, 64), random_metric(rng, 64)
    mask = torch.arange(640) < 576
    for bits in BITS:
        here = run(x, mask, bits, metric)
        there = shaping.shape(torch.from_numpy(x).cuda(), mask.cuda(), bits, torch.from_numpy(metric).cuda())
        ours, theirs = (error(x, 576, *(t.cpu().numpy() for t in q), metric) for q in (there, here))
        assert abs(ours - theirs) <= 0.01 * theirs
