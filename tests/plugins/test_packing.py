"""Bit planes of the packed format against the slow NumPy oracle, and the size of groups."""

from __future__ import annotations

import numpy as np
import oracle
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vkvx.errors import OptionError
from vkvx.plugins.reference import quantization as q

BITS = (1, 2, 4, 8)
SEEDS = st.integers(0, 2**32 - 1)
HEAD_DIMS = st.sampled_from(range(32, 257, 32))


def few(examples: int) -> settings:
    return settings(max_examples=examples, deadline=None, derandomize=True)


@given(SEEDS, st.sampled_from(BITS), HEAD_DIMS, st.integers(1, 3), st.sampled_from([(), (2,), (2, 1, 2)]))
@few(40)
def test_codes_survive_packing(seed: int, bits: int, d: int, tiles: int, lead: tuple[int, ...]) -> None:
    codes = torch.from_numpy(np.random.default_rng(seed).integers(0, 2**bits, (*lead, tiles * 128, d)).astype(np.uint8))
    keys, values = q.pack_keys(codes, bits), q.pack_values(codes, bits)
    assert keys.dtype == values.dtype == torch.int32
    assert keys.shape == (*lead, tiles, bits, 128, d // 32)
    assert values.shape == (*lead, tiles, bits, d, 4)
    assert torch.equal(q.unpack_keys(keys), codes)
    assert torch.equal(q.unpack_values(values), codes)
    assert q.unpack_keys(keys).dtype == torch.uint8


@given(SEEDS, st.sampled_from(BITS), HEAD_DIMS, st.integers(1, 2))
@few(25)
def test_bits_lie_where_the_format_says(seed: int, bits: int, d: int, tiles: int) -> None:
    codes = np.random.default_rng(seed).integers(0, 2**bits, (2, tiles * 128, d)).astype(np.uint8)
    assert np.array_equal(q.pack_keys(torch.from_numpy(codes), bits).numpy(), oracle.pack_keys(codes, bits))
    assert np.array_equal(q.pack_values(torch.from_numpy(codes), bits).numpy(), oracle.pack_values(codes, bits))


@given(SEEDS, st.sampled_from(BITS), HEAD_DIMS)
@few(25)
def test_any_words_survive_unpacking(seed: int, bits: int, d: int) -> None:
    rng = np.random.default_rng(seed)
    keys = rng.integers(-(2**31), 2**31, (2, bits, 128, d // 32)).astype(np.int32)
    values = rng.integers(-(2**31), 2**31, (2, bits, d, 4)).astype(np.int32)
    key_codes, value_codes = q.unpack_keys(torch.from_numpy(keys)), q.unpack_values(torch.from_numpy(values))
    assert np.array_equal(key_codes.numpy(), oracle.unpack_keys(keys))
    assert np.array_equal(value_codes.numpy(), oracle.unpack_values(values))
    assert np.array_equal(q.pack_keys(key_codes, bits).numpy(), keys)
    assert np.array_equal(q.pack_values(value_codes, bits).numpy(), values)


def test_single_bits_by_hand() -> None:
    codes = torch.zeros(256, 64, dtype=torch.uint8)
    codes[130, 63] = 0b10
    keys, values = q.pack_keys(codes, 2), q.pack_values(codes, 2)
    assert keys.count_nonzero() == values.count_nonzero() == 1
    assert keys[1, 1, 2, 1] == -(2**31)  # tile 1, plane 1, token 2, word 1, bit 31
    assert values[1, 1, 63, 0] == 1 << 2  # tile 1, plane 1, channel 63, word 0, bit 2


@pytest.mark.parametrize(("n", "d", "bits"), [(100, 32, 1), (0, 48, 1), (128, 48, 2), (128, 64, 3), (128, 64, 16)])
def test_packing_refuses_what_the_format_lacks(n: int, d: int, bits: int) -> None:
    codes = torch.zeros(n, d, dtype=torch.uint8)
    for pack in (q.pack_keys, q.pack_values):
        with pytest.raises(OptionError):
            pack(codes, bits)


@pytest.mark.parametrize(
    ("tokens", "group_size"), [(576, 640), (3328, 896), (256, 256), (1, 128), (1024, 1024), (1025, 640), (None, 256)]
)
def test_auto_group_size_examples(tokens: int | None, group_size: int) -> None:
    assert q.auto_group_size(tokens) == oracle.auto_group_size(tokens) == group_size


@given(st.integers(1, 100_000))
@few(200)
def test_auto_group_size_holds_a_picture_in_few_even_groups(tokens: int) -> None:
    size = q.auto_group_size(tokens)
    assert size == oracle.auto_group_size(tokens)
    assert size % 128 == 0
    assert 128 <= size <= 1024
    groups = -(-tokens // size)
    assert groups <= -(-tokens // 1024)
    assert groups * size - tokens < 128 * (groups + 1)
