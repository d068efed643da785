"""Plans: bytes against a real bundle and cache, and what is refused."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from vkvx import CapacityError, ExportOptions, ModelError, OptionError
from vkvx.manifest import Manifest
from vkvx.models.registry import TINY_LLAVA
from vkvx.options import QuantizationOptions
from vkvx.runtime.cache import PackedCache
from vkvx.runtime.checks.plan import plan_model

MEMORY = 1 << 30


def test_bytes_are_those_of_a_bundle(tiny_bundle: Path) -> None:
    manifest = Manifest.load(tiny_bundle)
    plan = plan_model("tiny-llava", MEMORY, bits=(16, 1), pictures=2, text_tokens=100)
    row = plan.rows[1]
    size = manifest.quantization.group_size
    buffers = PackedCache(manifest.layout, 1, size * -(-576 // size), 100).buffers
    allocated = sum(buffer.nbytes for buffer in buffers.values())
    assert row.bytes_per_picture + 100 * row.bytes_per_text_token == allocated
    assert row.bytes_per_slot == allocated + row.bytes_per_picture
    assert row.max_slots == plan.cache // row.bytes_per_slot
    assert plan.rows[0].bytes_per_picture == manifest.layout.sixteen_bit_bytes_per_picture()


def test_text_of_8_bits_beside_packed_pictures() -> None:
    plain, packed = plan_model("tiny-llava", MEMORY, options=QuantizationOptions(text_bits=8), bits=(16, 1)).rows
    assert plain.bytes_per_text_token == 4 * 2 * 2 * 2 * 64  # layers, keys and values, heads, bytes, channels
    assert packed.bytes_per_text_token == 4 * 2 * 2 * (64 + 4)


def test_weights_are_those_of_the_files(tiny_bundle: Path) -> None:
    plan = plan_model("tiny-llava", MEMORY)
    weights = sum(path.stat().st_size for path in tiny_bundle.glob("*.safetensors") if "metrics" not in path.name)
    assert weights == pytest.approx(plan.weights, rel=0.02)


def test_context_ends_at_memory_or_positions() -> None:
    large = plan_model("tiny-llava", MEMORY, bits=(1,), text_tokens=1024).rows[0]
    assert large.limited_by == "positions"
    assert large.max_context <= plan_model("tiny-llava", MEMORY).model.max_positions < large.max_context + 576
    small = plan_model("tiny-llava", 13 << 20, bits=(1,), text_tokens=16, reserve=0.0)
    row = small.rows[0]
    held = row.max_pictures * row.bytes_per_picture + 16 * row.bytes_per_text_token
    if row.limited_by == "memory":
        assert held <= small.cache < held + row.bytes_per_picture


def test_break_even_is_where_the_cache_outweighs_the_decoder() -> None:
    plan = plan_model("tiny-llava", MEMORY, text_tokens=8)
    for row in plan.rows:
        assert (
            row.break_even_slots * row.bytes_per_slot
            >= plan.decoder_bytes
            > ((row.break_even_slots - 1) * row.bytes_per_slot)
        )


def test_config_files_are_enough(tmp_path: Path) -> None:
    for path in TINY_LLAVA.glob("*.json"):
        shutil.copy(path, tmp_path)
    assert plan_model(tmp_path, MEMORY).rows == plan_model("tiny-llava", MEMORY).rows


def test_refusals() -> None:
    with pytest.raises(CapacityError, match=r"larger memory= \(--gpu-memory\)"):
        plan_model("tiny-llava", 1 << 20)
    with pytest.raises(CapacityError, match=r"5000 x 576 visual and 1024 text tokens are 2881024 pos.* has 4096;"):
        plan_model("tiny-llava", MEMORY, pictures=5000)
    assert plan_model("tiny-llava", MEMORY, pictures=7, text_tokens=64).rows[0].max_pictures == 7  # all 4096
    with pytest.raises(CapacityError, match="are 4097 positions"):
        plan_model("tiny-llava", MEMORY, pictures=7, text_tokens=65)
    with pytest.raises(ModelError, match="unknown model"):
        plan_model("no-such-model", MEMORY)
    for wrong in (
        {"bits": ()},
        {"bits": (3,)},
        {"pictures": -1},
        {"text_tokens": 0},
        {"reserve": 1.0},
        {"tokens_per_picture": 100},
        {"tokens_per_picture": 0},
        {"options": ExportOptions(group_size=100)},
        {"options": QuantizationOptions(text_bits=4)},
        {"options": QuantizationOptions(text_bits=4), "bits": (16,)},
        {"options": QuantizationOptions(text_bits=8), "bits": (16,)},
    ):
        with pytest.raises(OptionError):
            plan_model("tiny-llava", MEMORY, **wrong)  # type: ignore[arg-type]
