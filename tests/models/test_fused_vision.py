"""Towers that attend by torch's kernels make the embeddings of the plain formula."""

from __future__ import annotations

import pytest
import torch
import transformers

from vkvx.models.graph.vision import EAGER, FUSED, PACKED, PACKED_FUSED, VisionGraph
from vkvx.models.pictures.kinds import open_pictures
from vkvx.models.presets import preset_config
from vkvx.models.registry import family_of


@pytest.mark.parametrize("preset", ["tiny-internvl", "tiny-idefics3", "tiny-pixtral", "tiny-qwen2.5-vl", "tiny-gemma4"])
def test_fused_attention_of_towers(preset: str) -> None:
    torch.manual_seed(0)
    config = preset_config(preset)
    model = getattr(transformers, config.architectures[0])(config).eval().requires_grad_(False)
    family = family_of(model)
    specs = family.pixel_inputs(config)
    picture = open_pictures(family.info(config, "float32").pictures).example(specs, 64)
    pixels = [torch.from_numpy(picture.arrays[spec.name]) for spec in specs]
    found, ways = [], []
    for fused in (False, True):
        found.append(VisionGraph(model, family, torch.float32, fused=fused)(*pixels).double())
        ways.append(model.config.vision_config._attn_implementation)
    assert ways in ([EAGER, FUSED], [PACKED, PACKED_FUSED])
    plain, torchs = found
    assert torch.isfinite(plain).all()
    # Each has rounded sums of at most 512 terms, three layers one after another.
    assert (torchs - plain).norm() <= 3 * 512 * 2**-24 * plain.norm()
