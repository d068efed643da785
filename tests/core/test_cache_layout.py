"""The layout of a cache: shapes by layer, and bytes that are those of the tensors."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from math import ceil

import pytest
from fakes import manifest

from vkvx.cache_layout import CacheLayout, tensor_bytes
from vkvx.format import CACHE_NAMES


def layout(bits: int = 1, dtype: str = "float16", tokens: tuple[int, ...] = (576,)) -> CacheLayout:
    """Two layers, two KV heads of 64 channels, groups of 640."""
    facts = manifest(bits, dtype=dtype, group_size=640)
    return CacheLayout(replace(facts.model, typical_tokens=tokens), facts.quantization)


@pytest.mark.parametrize("bits", [1, 2, 4, 8])
def test_bytes_of_a_picture_are_those_of_its_tensors(bits: int) -> None:
    found = layout(bits)
    total = sum(tensor_bytes(*tensor) for tensor in found.tensors(1, ceil(576 / 640) * 640, 0).values())
    assert total == 2 * 2 * 64 * (640 * 2 * bits // 8 + 10)  # layers, heads, channels: as docs/format.md says
    assert found.visual_bytes_per_picture() == total
    assert found.visual_bytes_per_picture(641) == 2 * total
    assert found.sixteen_bit_bytes_per_picture() == 576 * found.text_bytes_per_token
    assert found.bits_per_element() == pytest.approx(8 * total / (576 * 2 * 2 * 2 * 64))
    assert found.is_packed


def test_one_bit_picture_takes_at_most_a_twelfth() -> None:
    assert 12 * layout().visual_bytes_per_picture() <= layout().sixteen_bit_bytes_per_picture()


def test_mixed_bits_give_each_layer_its_planes() -> None:
    one = layout()
    mixed = replace(one, quantization=replace(one.quantization, key_bits=(8, 1), value_bits=(4, 2)))
    shapes = mixed.tensors(3, 1280, 7)
    assert list(shapes) == [f"{layer}.{name}" for layer in range(2) for name in CACHE_NAMES]
    assert shapes["0.visual_key"] == ("int32", (3, 2, 10, 8, 128, 2))
    assert shapes["1.visual_value"] == ("int32", (3, 2, 10, 2, 64, 4))
    assert shapes["0.visual_key_params"] == ("float16", (3, 2, 2, 3, 64))
    assert shapes["1.visual_value_params"] == ("float16", (3, 2, 2, 2, 64))
    assert shapes["1.text_key"] == ("float16", (3, 2, 7, 64))
    assert mixed.layer_tensors(1, "Bc", "T", "G", "N")["visual_value"] == ("int32", ("Bc", 2, "T", 2, 64, 4))


def test_sixteen_bits_keep_pictures_with_the_text() -> None:
    found = layout(16)
    assert not found.is_packed
    assert found.bytes_per_group == 0
    assert found.visual_bytes_per_picture() == found.sixteen_bit_bytes_per_picture()
    assert found.bits_per_element() == 16
    assert found.tensors(2, 0, 5)["0.visual_key"] == ("int32", (2, 2, 0, 1, 128, 2))
    with pytest.raises(ValueError, match="640"):
        found.tensors(2, 640, 5)


@pytest.mark.parametrize(("dtype", "size"), [("float16", 2), ("bfloat16", 2), ("float32", 4)])
def test_text_takes_the_dtype_of_the_model(dtype: str, size: int) -> None:
    found = layout(dtype=dtype)
    assert found.elements_per_token == 2 * 2 * 2 * 64
    assert found.text_bytes_per_token == size * found.elements_per_token
    assert found.visual_bytes_per_picture() == layout().visual_bytes_per_picture()


def test_where_pictures_vary_a_large_one_stands_for_them() -> None:
    found = layout(tokens=(100, 700))
    assert found.visual_bytes_per_picture() == 2 * found.bytes_per_group
    assert found.sixteen_bit_bytes_per_picture() == 700 * found.text_bytes_per_token
    assert found.visual_bytes((100, 641, 640)) == 4 * found.bytes_per_group


def test_needs_the_standard_library_only() -> None:
    code = "import sys, vkvx.cache_layout; print(*{'numpy', 'torch', 'onnx', 'transformers'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == ""
