"""Towers that attend by torch's kernels make the embeddings of the plain formula."""

from __future__ import annotations

import pytest
import torch
import transformers

from vkvx.models.graph.vision import VisionGraph
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
    plain, fused = (VisionGraph(model, family, torch.float32, fused=fused)(*pixels).double() for fused in (False, True))
    assert torch.isfinite(plain).all()
    # Each has rounded sums of at most 512 terms, three layers one after another.
    assert (fused - plain).norm() <= 3 * 512 * 2**-24 * plain.norm()
    assert not torch.equal(fused, plain), "the formula and the kernels round at other places"
