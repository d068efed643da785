"""Pictures that follow each other without a mark: the plug-in tells them apart by their sizes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from reference import Reference, picture

from vkvx import InputError, quantize_visual_cache
from vkvx.models.presets import preset_config
from vkvx.models.random_checkpoint import write_checkpoint

PICTURES = ([picture(150, 90, 1), picture(60, 130, 2)], [picture(60, 130, 3)])
LENGTHS = [[52, 56], [56, 0]]


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> Reference:
    directory = tmp_path_factory.mktemp("sized") / "checkpoint"
    write_checkpoint(directory, preset_config("tiny-llava-next"), dtype="float32")
    return Reference(directory)


@pytest.fixture(scope="module")
def inputs(reference: Reference) -> dict[str, torch.Tensor]:
    return reference.inputs(["<image><image>\nWhat differs?", "Here<image>"], PICTURES)


def test_adjacent_pictures(reference: Reference, inputs: dict[str, Any]) -> None:
    with quantize_visual_cache(reference.model) as handle:
        called, generated = handle.new_cache(), handle.new_cache()
        reference.model(**inputs, past_key_values=called)
        reference.model.generate(**inputs, past_key_values=generated, max_new_tokens=2)
    for cache in (called, generated):
        assert cache._visual_count.tolist() == LENGTHS  # a group each, as neither fills one


def test_sizes_that_do_not_suit_are_refused(reference: Reference, inputs: dict[str, Any]) -> None:
    with quantize_visual_cache(reference.model):
        with pytest.raises(InputError, match="108 visual tokens in a row"):
            reference.model(**{**inputs, "image_sizes": inputs["image_sizes"][:1].expand(3, 2)})
        with pytest.raises(InputError, match="give image_sizes"):
            reference.model(**{name: given for name, given in inputs.items() if name != "image_sizes"})
