"""Quantisers and bit planes against the slow NumPy oracle and against what the format promises."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import oracle
import pytest
import torch
from distributions import KINDS, NO_CLAMP, sample
from hypothesis import given, settings
from hypothesis import strategies as st
from oracle import ulp16
from torch import Tensor

from vkvx.errors import OptionError
from vkvx.format import METRIC_QUANTIZERS, QUANTIZERS
from vkvx.plugins.reference import quantization as q

BITS = (1, 2, 4, 8)
OWN_LEVELS = tuple(name for name in QUANTIZERS if name not in METRIC_QUANTIZERS)
EVERY = pytest.mark.parametrize(("bits", "quantizer"), [(b, name) for name in OWN_LEVELS for b in BITS])
SEEDS = st.integers(0, 2**32 - 1)


def few(examples: int) -> settings:
    return settings(max_examples=examples, deadline=None, derandomize=True)


def prefix_mask(count: int, n: int) -> Tensor:
    return torch.arange(n) < count


def defaults(bits: int) -> dict[str, float]:
    return {"alpha": q.QUANTILE_ALPHA[bits], "gamma": q.SHRINK_KEY[bits]}


def level_rounding(scale: Any, offset: Any, bits: int) -> np.ndarray:
    """How far FP16 rounding of scale and offset can move any level."""
    return ulp16(offset) / 2 + (2**bits - 1) * ulp16(scale) / 2


def root_mean_square(x: np.ndarray, dequantised: np.ndarray) -> np.ndarray:
    return np.sqrt(np.mean((x.astype(np.float64) - dequantised) ** 2, axis=-2))


def check_group(
    x: np.ndarray, count: int, bits: int, quantizer: str, alpha: float, gamma: float, device: str = "cpu"
) -> float:
    """Levels and codes of one group x [n, D] against the oracle; returns the share of channels compared exactly."""
    n, d = x.shape
    mask = prefix_mask(count, n)
    there = torch.from_numpy(x).to(device), mask.to(device)
    quantized = q.quantize(*there, bits, quantizer, alpha=alpha, gamma=gamma)
    codes, scale, offset = (t.cpu().numpy() for t in quantized)
    stable = 0
    for channel in range(d):
        expected = oracle.channel_levels(x[:, channel], mask.numpy(), bits, quantizer, alpha, gamma)
        if expected.stable:
            stable += 1
            for name, got, want, slack in (
                ("scale", scale[channel], expected.scale, expected.slack_scale),
                ("offset", offset[channel], expected.offset, expected.slack_offset),
            ):
                bound = 2 * max(ulp16(got), ulp16(want)) + slack
                assert abs(float(got) - float(want)) <= bound, (name, channel, got, want, slack)
        else:  # the iteration may reach another fixed point, but none worse than its start
            valid = oracle.sanitise(x[:count, channel])
            start = oracle.channel_levels(x[:, channel], mask.numpy(), bits, "minmax", alpha, gamma)
            errors = []
            for level in (expected, start):
                theirs, _ = oracle.encode(valid, level.scale, level.offset, bits)
                errors.append(oracle.rms(valid, oracle.decode(theirs, level.scale, level.offset), valid == valid))
            mine = oracle.rms(
                valid, oracle.decode(codes[:count, channel], scale[channel], offset[channel]), valid == valid
            )
            slack = level_rounding(scale[channel], offset[channel], bits) + 1e-6 * np.abs(valid).max()
            assert mine <= max(1.1 * errors[0], errors[1]) + slack, channel
    wanted, certain = oracle.encode(x, scale, offset, bits)
    assert np.array_equal(codes[:count][certain[:count]], wanted[:count][certain[:count]])
    assert np.abs(codes[:count].astype(int) - wanted[:count]).max(initial=0) <= 1
    assert not codes[count:].any()
    return stable / d


def test_quantiser_refuses_unknown_bits_and_names() -> None:
    x, mask = torch.zeros(128, 32), torch.ones(128, dtype=torch.bool)
    for bits in (0, 3, 16):
        with pytest.raises(OptionError, match=str(bits)):
            q.levels(x, mask, bits, "minmax")
    with pytest.raises(OptionError, match="kmeans"):
        q.levels(x, mask, 1, "kmeans")


# --- levels and codes against the oracle ------------------------------------------------------------------------------


@EVERY
@given(SEEDS, st.sampled_from(KINDS), st.integers(1, 256), st.sampled_from([0.0, 0.005, 0.07, 0.2, 0.4]))
@few(8)
def test_groups_agree_with_the_oracle(
    bits: int, quantizer: str, seed: int, kind: str, count: int, alpha: float
) -> None:
    gamma = 0.3 if seed % 2 else q.SHRINK_VALUE[bits]
    check_group(sample(kind, seed, (256, 32)), count, bits, quantizer, alpha, gamma)


@EVERY
@pytest.mark.parametrize("kind", ["normal", "uniform", "outlier_channels"])
def test_ordinary_groups_are_compared_exactly(bits: int, quantizer: str, kind: str) -> None:
    """The comparison above makes room where FP32 rounding decides; ordinary data needs that room hardly ever."""
    x = sample(kind, 5, (640, 32))
    share = check_group(x, 576, bits, quantizer, q.QUANTILE_ALPHA[bits], q.SHRINK_KEY[bits])
    assert share >= 0.9


@EVERY
@given(
    st.lists(st.floats(width=16, allow_nan=True, allow_infinity=True), min_size=1, max_size=24),
    st.sampled_from([0.0, 0.07, 0.2]),
    st.sampled_from([0.3, 1.0]),
)
@few(25)
def test_any_half_numbers_agree_with_the_oracle(
    bits: int, quantizer: str, values: list[float], alpha: float, gamma: float
) -> None:
    x = np.full((128, 1), np.nan, np.float32)
    x[: len(values), 0] = values
    check_group(x, len(values), bits, quantizer, alpha, gamma)


@given(st.lists(st.floats(width=32), min_size=1, max_size=16), st.sampled_from(BITS))
@few(60)
def test_any_single_precision_numbers_agree_with_the_oracle(values: list[float], bits: int) -> None:
    x = np.zeros((128, 1), np.float32)
    x[: len(values), 0] = values
    check_group(x, len(values), bits, "minmax", 0.0, 1.0)


@pytest.mark.parametrize("group_size", range(128, 1025, 128))
@pytest.mark.parametrize("quantizer", OWN_LEVELS)
def test_every_group_size(group_size: int, quantizer: str) -> None:
    for bits, count in ((1, group_size), (2, group_size - 5), (4, 1), (8, group_size // 2)):
        x = sample("normal", group_size + bits, (group_size, 32))
        check_group(x, count, bits, quantizer, q.QUANTILE_ALPHA[bits], q.SHRINK_KEY[bits])
        codes = q.quantize(torch.from_numpy(x), prefix_mask(count, group_size), bits, quantizer).codes
        assert torch.equal(q.unpack_keys(q.pack_keys(codes, bits)), codes)
        assert torch.equal(q.unpack_values(q.pack_values(codes, bits)), codes)


# --- what the format promises -----------------------------------------------------------------------------------------


@given(
    SEEDS,
    st.sampled_from(BITS),
    st.floats(2.0**-14, 200.0, width=16),
    st.floats(-1000.0, 1000.0, width=16),
)
@few(60)
def test_encoding_decoded_codes_gives_them_back(seed: int, bits: int, scale: float, offset: float) -> None:
    # FP32 has to tell two levels apart: beyond this ratio it cannot
    scale = max(scale, abs(offset) * 2.0**-20)
    codes = torch.from_numpy(np.random.default_rng(seed).integers(0, 2**bits, (128, 32)).astype(np.uint8))
    scales, offsets = torch.full((32,), scale).half(), torch.full((32,), offset).half()
    again = q.encode(q.decode(codes, scales, offsets), scales, offsets, bits)
    assert torch.equal(again, codes)


def test_halves_are_rounded_to_even() -> None:
    x = torch.tensor([-3.0, -1.0, 1.0, 3.0, 5.0, 7.0, 9.0])[:, None]
    codes = q.encode(x, torch.tensor([2.0]).half(), torch.tensor([-3.0]).half(), 2)
    assert codes.flatten().tolist() == [0, 1, 2, 3, 3, 3, 3]
    codes = q.encode(x, torch.tensor([4.0]).half(), torch.tensor([-3.0]).half(), 2)
    assert codes.flatten().tolist() == [0, 0, 1, 2, 2, 2, 3]


@EVERY
@given(SEEDS, st.sampled_from(NO_CLAMP))
@few(5)
def test_quantising_twice_changes_no_code(bits: int, quantizer: str, seed: int, kind: str) -> None:
    x = torch.from_numpy(sample(kind, seed, (256, 32)))
    mask = torch.ones(256, dtype=torch.bool)
    codes, scale, offset = q.quantize(x, mask, bits, quantizer, **defaults(bits))
    assert torch.equal(q.encode(q.decode(codes, scale, offset), scale, offset, bits), codes)


@EVERY
@given(SEEDS, st.sampled_from(KINDS))
@few(5)
def test_error_is_half_a_step_within_the_levels(bits: int, quantizer: str, seed: int, kind: str) -> None:
    x = sample(kind, seed, (128, 32))
    codes, scale, offset = q.quantize(
        torch.from_numpy(x), torch.ones(128, dtype=torch.bool), bits, quantizer, **defaults(bits)
    )
    clean = oracle.sanitise(x)
    deq = q.decode(codes, scale, offset).numpy()
    step, low = scale.numpy().astype(np.float64), offset.numpy().astype(np.float64)
    high = low + step * (2**bits - 1)
    rounding = 2.0**-22 * np.maximum(np.abs(clean), np.maximum(np.abs(low), np.abs(high)))
    inside = (clean >= low) & (clean <= high)
    distance = np.where(inside, step / 2, np.maximum(low - clean, clean - high))
    assert np.all(np.abs(clean - deq) <= distance * (1 + 1e-6) + rounding)
    if quantizer == "minmax" and kind != "huge":  # there the spread may exceed the largest scale
        assert np.all(np.where(inside, 0.0, distance) <= level_rounding(step, low, bits) + rounding)


@given(SEEDS, st.sampled_from(BITS), st.integers(2, 256), st.sampled_from(["normal", "heavy_tails", "fp16_grid"]))
@few(30)
def test_quantile_levels_are_numpys(seed: int, bits: int, count: int, kind: str) -> None:
    x = sample(kind, seed, (256, 32))
    alpha = q.QUANTILE_ALPHA[bits]
    x[count:] = np.nan
    scale, offset = q.levels(torch.from_numpy(x), prefix_mask(count, 256), bits, "quantile", alpha=alpha)
    low, high = np.quantile(x[:count].astype(np.float64), [alpha, 1 - alpha], axis=0)
    blur = 2.0**-20 * np.abs(x[:count]).max(0)
    assert np.all(np.abs(offset.numpy() - low) <= ulp16(low) + blur)
    step = (high - low) / (2**bits - 1)
    assert np.all(np.abs(scale.numpy() - step) <= ulp16(step) + blur)


@given(SEEDS, st.sampled_from(BITS), st.sampled_from(NO_CLAMP))
@few(20)
def test_a_larger_alpha_or_smaller_gamma_narrows_the_levels(seed: int, bits: int, kind: str) -> None:
    x, mask = torch.from_numpy(sample(kind, seed, (128, 32))), torch.ones(128, dtype=torch.bool)

    def bounds(quantizer: str, **chosen: float) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        scale, offset = (t.numpy().astype(np.float64) for t in q.levels(x, mask, bits, quantizer, **chosen))
        return offset, offset + (2**bits - 1) * scale, level_rounding(scale, offset, bits)

    around_zero = (x.amin(0) < 0).numpy() & (x.amax(0) > 0).numpy()
    for sweep, applies in (
        ([bounds("quantile", alpha=a) for a in (0.0, 0.005, 0.07, 0.2, 0.4)], np.ones(32, bool)),
        ([bounds("shrink", gamma=g) for g in (1.0, 0.5, 0.3)], around_zero),
    ):
        for (low, high, room), (low2, high2, room2) in itertools.pairwise(sweep):
            # a channel whose levels have collapsed has its mean as the one level
            open_ = applies & (high2 > low2)
            slack = 2 * (room + room2)
            assert np.all((low2 >= low - slack)[open_])
            assert np.all((high2 <= high + slack)[open_])
    for one, other in (("quantile", {"alpha": 0.0}), ("shrink", {"gamma": 1.0})):
        for got, want in zip(bounds(one, **other)[:2], bounds("minmax")[:2], strict=True):
            assert np.all(np.abs(got - want) <= 2 * bounds("minmax")[2] + 2.0**-20 * np.abs(x.numpy()).max(0))


@given(SEEDS, st.sampled_from((2, 4, 8)), st.sampled_from(KINDS), st.integers(2, 128))
@few(40)
def test_lloyd_is_never_worse_than_minmax_where_it_starts(seed: int, bits: int, kind: str, count: int) -> None:
    x = sample(kind, seed, (128, 32))
    errors, rounding = {}, np.zeros(32)
    for quantizer in ("minmax", "lloyd"):
        codes, scale, offset = q.quantize(torch.from_numpy(x), prefix_mask(count, 128), bits, quantizer)
        errors[quantizer] = root_mean_square(oracle.sanitise(x)[:count], q.decode(codes, scale, offset).numpy()[:count])
        rounding = rounding + level_rounding(scale.numpy(), offset.numpy(), bits)
    assert np.all(errors["lloyd"] <= errors["minmax"] * (1 + 1e-4) + rounding + 1e-6 * np.abs(x).max(0))


@given(SEEDS, st.sampled_from(NO_CLAMP), st.integers(2, 128))
@few(40)
def test_two_level_lloyd_is_never_worse_than_its_start(seed: int, kind: str, count: int) -> None:
    """Its start: the two sides of the mean, each at its own mean."""
    x = sample(kind, seed, (128, 32))
    codes, scale, offset = q.quantize(torch.from_numpy(x), prefix_mask(count, 128), 1, "lloyd")
    valid = x[:count].astype(np.float64)
    above = valid > valid.mean(0)
    mean_above = np.sum(valid * above, 0) / np.maximum(above.sum(0), 1)
    mean_below = np.sum(valid * ~above, 0) / np.maximum((~above).sum(0), 1)
    start = root_mean_square(valid, np.where(above, mean_above, mean_below))
    error = root_mean_square(valid, q.decode(codes, scale, offset).numpy()[:count])
    room = level_rounding(scale.numpy(), offset.numpy(), 1) + 1e-6 * np.abs(valid).max(0)
    assert np.all(error <= start * (1 + 1e-4) + room)


@given(SEEDS, st.sampled_from(["normal", "uniform", "two_clusters", "outlier_channels", "far_from_zero"]))
@few(30)
def test_two_level_lloyd_beats_the_other_quantisers_on_ordinary_data(seed: int, kind: str) -> None:
    """Not so on all data: an outlier that minmax meets with a level of its own can leave lloyd in a worse optimum."""
    x, mask = sample(kind, seed, (256, 32)), torch.ones(256, dtype=torch.bool)
    errors = {}
    for quantizer in OWN_LEVELS:
        codes, scale, offset = q.quantize(torch.from_numpy(x), mask, 1, quantizer, alpha=0.2, gamma=0.5)
        errors[quantizer] = root_mean_square(x, q.decode(codes, scale, offset).numpy())
    room = level_rounding(scale.numpy(), offset.numpy(), 1)
    for quantizer in ("minmax", "quantile", "shrink"):
        # 8 rounds end a little short of the optimum, which chance may bring another quantiser closer to
        shortfall = 1.0 if quantizer == "minmax" else 1.03
        assert np.all(errors["lloyd"] <= shortfall * errors[quantizer] + room), quantizer


# --- degenerate channels ----------------------------------------------------------------------------------------------


@EVERY
@given(st.floats(width=16, allow_nan=False, allow_infinity=False), st.integers(1, 128))
@few(12)
def test_a_constant_channel_is_exact(bits: int, quantizer: str, value: float, count: int) -> None:
    x = torch.full((128, 32), value)
    mask = prefix_mask(count, 128)
    quantized = q.quantize(x, mask, bits, quantizer, alpha=0.2, gamma=0.3)
    assert not quantized.scale.any()
    assert not quantized.codes.any()
    assert torch.equal(quantized.offset.float(), x[0])
    assert not q.residual_rms(x, mask, quantized).any()


@EVERY
def test_a_group_of_padding_is_all_zero(bits: int, quantizer: str) -> None:
    x = torch.full((2, 128, 32), torch.nan)
    x[1] = torch.inf
    mask = torch.zeros(2, 128, dtype=torch.bool)
    quantized = q.quantize(x, mask, bits, quantizer, alpha=0.2, gamma=0.3)
    for tensor in (*quantized, q.residual_rms(x, mask, quantized)):
        assert not tensor.any()


@EVERY
def test_nan_counts_as_zero_and_infinity_as_the_largest_half(bits: int, quantizer: str) -> None:
    rng = np.random.default_rng(bits)
    dirty = sample("normal", bits, (256, 32))
    where = rng.integers(0, 6, dirty.shape)
    clean = dirty.copy()
    for mark, bad, good in ((1, np.nan, 0.0), (2, np.inf, 65504.0), (3, -np.inf, -65504.0), (4, 3e38, 65504.0)):
        dirty[where == mark], clean[where == mark] = bad, good
    mask = prefix_mask(200, 256)
    chosen = defaults(bits)
    got = q.quantize(torch.from_numpy(dirty), mask, bits, quantizer, **chosen)
    want = q.quantize(torch.from_numpy(clean), mask, bits, quantizer, **chosen)
    for a, b in zip(got, want, strict=True):
        assert torch.equal(a, b)
        assert torch.isfinite(a.float()).all()
    got_rms, want_rms = (q.residual_rms(torch.from_numpy(t), mask, want) for t in (dirty, clean))
    assert torch.equal(got_rms, want_rms)
    assert torch.isfinite(got_rms).all()


@pytest.mark.parametrize("quantizer", OWN_LEVELS)
@pytest.mark.parametrize("bits", BITS)
def test_a_spread_below_half_precision_collapses_to_the_mean(bits: int, quantizer: str) -> None:
    x = torch.tensor([-1e-8, 3e-8]).repeat(64)[:, None].expand(128, 32) + 0.25
    far = torch.tensor([1.0, 1.0 + 2.0**-23]).repeat(64)[:, None].expand(128, 32)
    for data, mean in ((x.double().float(), 0.25), (far, 1.0)):
        codes, scale, offset = q.quantize(data, torch.ones(128, dtype=torch.bool), bits, quantizer)
        deq = q.decode(codes, scale, offset)
        assert (deq - mean).abs().max() <= 3e-7
        assert torch.isfinite(deq).all()


# --- padding, batches, dtypes -----------------------------------------------------------------------------------------


@EVERY
@given(SEEDS, st.integers(0, 256), st.sampled_from([0.0, torch.nan, torch.inf, -1e30]))
@few(5)
def test_padding_changes_nothing(bits: int, quantizer: str, seed: int, count: int, garbage: float) -> None:
    x = torch.from_numpy(sample("normal", seed, (256, 32)))
    mask = prefix_mask(count, 256)
    dirty = torch.where(mask[:, None], x, garbage)
    chosen = defaults(bits)
    one, other = (q.quantize(t, mask, bits, quantizer, **chosen) for t in (x, dirty))
    for a, b in zip(one, other, strict=True):
        assert torch.equal(a, b)
    assert torch.equal(q.residual_rms(x, mask, one), q.residual_rms(dirty, mask, one))


@EVERY
@given(SEEDS, st.integers(1, 128))
@few(4)
def test_the_amount_of_padding_changes_nothing(bits: int, quantizer: str, seed: int, count: int) -> None:
    chosen = defaults(bits)
    whole = sample("fp16_grid", seed, (1024, 32))
    results = []
    for n in (128, 256, 640, 1024):
        quantized = q.quantize(torch.from_numpy(whole[:n]), prefix_mask(count, n), bits, quantizer, **chosen)
        results.append((quantized.codes[:count], quantized.scale, quantized.offset))
    for codes, scale, offset in results[1:]:
        # sums over more entries are cut differently: FP32 rounding, seen through FP16
        assert ((scale - results[0][1]).abs().double() <= torch.from_numpy(2 * ulp16(scale.numpy()))).all()
        bound = torch.from_numpy(2 * ulp16(offset.numpy()) + 1e-6 * np.abs(whole[:count]).max(0))
        assert ((offset - results[0][2]).abs().double() <= bound).all()
        same = (scale == results[0][1]) & (offset == results[0][2])
        assert torch.equal(codes[:, same], results[0][0][:, same])


@EVERY
@given(SEEDS, st.sampled_from([32, 64, 96, 128]), st.sampled_from([128, 640]))
@few(4)
def test_groups_alone_or_together_give_the_same_bits(bits: int, quantizer: str, seed: int, d: int, n: int) -> None:
    rng = np.random.default_rng(seed)
    x = torch.from_numpy(sample("outlier_channels", seed, (2, 3, 2, n, d)))
    mask = torch.from_numpy(rng.integers(0, n + 1, (2, 1, 2, 1))) > torch.arange(n)
    mask = mask.expand(2, 3, 2, n)
    chosen = defaults(bits)
    together = q.quantize(x, mask, bits, quantizer, **chosen)
    together_rms = q.residual_rms(x, mask, together)
    # the same values in another memory layout, as attention hands them over
    strided = q.quantize(x.transpose(1, 3).contiguous().transpose(1, 3), mask, bits, quantizer, **chosen)
    for a, b in zip(together, strided, strict=True):
        assert torch.equal(a, b)
    for at in np.ndindex(2, 3, 2):
        alone = q.quantize(x[at].clone(), mask[at].clone(), bits, quantizer, **chosen)
        for whole, part in zip(together, alone, strict=True):
            assert torch.equal(whole[at], part), at
        assert torch.equal(together_rms[at], q.residual_rms(x[at].clone(), mask[at].clone(), alone))


@EVERY
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_every_float_type_is_read_exactly(bits: int, quantizer: str, dtype: torch.dtype) -> None:
    x = torch.from_numpy(sample("normal", 3, (2, 256, 64))).to(dtype)
    mask = torch.stack([prefix_mask(256, 256), prefix_mask(77, 256)])
    chosen = defaults(bits)
    got, want = (q.quantize(t, mask, bits, quantizer, **chosen) for t in (x, x.double().float()))
    for a, b in zip(got, want, strict=True):
        assert a.dtype == b.dtype
        assert torch.equal(a, b)
    assert got.codes.dtype == torch.uint8
    assert got.scale.dtype == got.offset.dtype == torch.float16
    before = x.clone()
    q.residual_rms(x, mask, got)
    assert torch.equal(x, before)


@EVERY
@given(SEEDS, st.sampled_from(KINDS), st.integers(1, 128))
@few(4)
def test_key_rms(bits: int, quantizer: str, seed: int, kind: str, count: int) -> None:
    x = sample(kind, seed, (128, 32))
    mask = prefix_mask(count, 128)
    quantized = q.quantize(torch.from_numpy(x), mask, bits, quantizer, **defaults(bits))
    got = q.residual_rms(torch.from_numpy(x), mask, quantized)
    assert got.dtype == torch.float16
    codes, scale, offset = (t.numpy() for t in quantized)
    for channel in range(32):
        deq = oracle.decode(codes[:, channel], scale[channel], offset[channel])
        want = oracle.rms(x[:, channel], deq, mask.numpy())
        assert abs(float(got[channel]) - want) <= ulp16(want) + 2.0**-22 * np.abs(oracle.sanitise(x[:, channel])).max()


# --- other devices ----------------------------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("quantizer", OWN_LEVELS)
def test_a_gpu_gives_the_same_results(quantizer: str) -> None:
    for bits, kind in itertools.product(BITS, KINDS):
        x = sample(kind, 11, (640, 32))
        check_group(x, 576, bits, quantizer, q.QUANTILE_ALPHA[bits], q.SHRINK_KEY[bits], device="cuda")
        codes, scale, offset = q.quantize(torch.from_numpy(x), prefix_mask(576, 640), bits, quantizer, **defaults(bits))
        there = q.encode(torch.from_numpy(x).cuda(), scale.cuda(), offset.cuda(), bits)
        assert torch.equal(there[:576].cpu(), codes[:576])
        for pack, unpack in ((q.pack_keys, q.unpack_keys), (q.pack_values, q.unpack_values)):
            words = pack(codes.cuda(), bits)
            assert torch.equal(words.cpu(), pack(codes, bits))
            assert torch.equal(unpack(words).cpu(), codes)
