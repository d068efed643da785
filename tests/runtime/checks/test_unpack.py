"""Codes from packed words in NumPy are those that torch finds."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from vkvx.format import BITS
from vkvx.plugins.reference import quantization, text_rows
from vkvx.runtime.checks.unpack import unpack_keys, unpack_text, unpack_values


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize(("tiles", "dim"), [(1, 32), (5, 64), (0, 128)])
def test_random_words(bits: int, tiles: int, dim: int) -> None:
    random = np.random.default_rng(bits)
    for shape, ours, theirs in (
        ((2, tiles, bits, 128, dim // 32), unpack_keys, quantization.unpack_keys),
        ((2, tiles, bits, dim, 4), unpack_values, quantization.unpack_values),
    ):
        words = random.integers(-(2**31), 2**31, shape).astype(np.int32)
        codes = ours(words)
        assert codes.shape == (2, 128 * tiles, dim)
        np.testing.assert_array_equal(codes, theirs(torch.from_numpy(words)).numpy())


def test_text_rows() -> None:
    rows = torch.randn(2, 7, 64) * torch.logspace(-6, 4, 7)[:, None]
    words = text_rows.encode(rows)
    numbers, scale = unpack_text(words.numpy())
    np.testing.assert_array_equal(numbers, text_rows.decode(words).numpy())
    np.testing.assert_array_equal(scale[..., 0].astype(np.float16).view(np.int16), words[..., -1].numpy())
