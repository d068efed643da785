"""The Triton rivals of the benchmarks against float64 over the same dequantised cache."""

from __future__ import annotations

import pytest
import torch

from vkvx.plugins.reference import quantization

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")]


@pytest.mark.parametrize("bits", [1, 4])
@pytest.mark.parametrize(("ratio", "cached"), [(1, 256), (1, 384), (4, 640), (7, 1280)])
def test_attention_and_dequantised_cache(bits: int, ratio: int, cached: int) -> None:
    triton_rival = pytest.importorskip("benchmarks.lib.triton_rival", exc_type=ImportError)
    rows, kv_heads, d, group_size = 3, 2, 128, 256
    groups = -(-cached // group_size)
    lead = (rows, kv_heads, groups * group_size, d)
    key_codes, value_codes = (torch.randint(0, 2**bits, lead, device="cuda") for _ in range(2))
    scale = torch.rand(rows, kv_heads, groups, 1, d, device="cuda") / (2**bits - 1) + 0.01
    key_params = torch.cat([scale, -scale * (2**bits - 1) / 2, torch.full_like(scale, torch.nan)], 3).half()
    value_params = key_params[:, :, :, :2].contiguous()
    words = (
        *(quantization.pack_keys(key_codes, bits), key_params),
        *(quantization.pack_values(value_codes, bits), value_params),
    )
    words[0][:, :, cached // 128 :] = words[2][:, :, cached // 128 :] = -1  # past the cached tokens
    key, value = (
        quantization.decode(codes.unflatten(2, (groups, group_size)), params[..., 0, :], params[..., 1, :])
        .flatten(2, 3)[:, :, :cached]
        .double()
        for codes, params in ((key_codes, key_params), (value_codes, value_params))
    )
    query = torch.randn(rows, kv_heads * ratio, 1, d, device="cuda").half()
    expected = torch.nn.functional.scaled_dot_product_attention(query.double(), key, value, enable_gqa=ratio > 1)
    output = triton_rival.attend(query, *words, cached=cached, scale=d**-0.5)
    assert (output - expected).norm() <= 1e-3 * expected.norm()
    filled = [torch.full((rows, kv_heads, cached, d), torch.nan, device="cuda").half() for _ in range(2)]
    triton_rival.dequantize(*words, key=filled[0], value=filled[1])
    for found, exact in zip(filled, (key, value), strict=True):
        torch.testing.assert_close(found.double(), exact, rtol=1e-3, atol=1e-3)
