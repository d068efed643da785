"""Ways from pictures to tokens against the arithmetic of transformers' models, for many sizes."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from reference import picture
from transformers.models.llava_next.modeling_llava_next import LlavaNextModel
from transformers.models.llava_onevision.modeling_llava_onevision import LlavaOnevisionModel

from vkvx.errors import BundleError, InputError
from vkvx.manifest import PictureInfo, TensorSpec
from vkvx.models.family import square_pixels
from vkvx.models.pictures.anyres import AnyRes
from vkvx.models.pictures.kinds import describe, open_pictures
from vkvx.models.pictures.rows import PatchRows
from vkvx.models.preset_processors import write_processor
from vkvx.models.presets import preset_config
from vkvx.models.processor_files import ProcessorFiles
from vkvx.models.registry import FAMILIES

SIZES = [
    (1, 1),
    (7, 500),
    (90, 150),
    (130, 60),
    (336, 336),
    (480, 640),
    (768, 1152),
    (1080, 1920),
    (1754, 1240),
    (3000, 4001),
]


@pytest.mark.parametrize(
    ("config", "model", "options"),
    [
        (transformers.LlavaNextConfig(), LlavaNextModel, {"vision_feature_select_strategy": "default"}),
        (transformers.LlavaOnevisionConfig(), LlavaOnevisionModel, {"vision_aspect_ratio": "anyres_max_9"}),
    ],
    ids=["next", "onevision"],
)
def test_packing_of_any_resolution(config: Any, model: Any, options: dict[str, Any]) -> None:
    architecture = model.__name__.replace("Model", "ForConditionalGeneration")
    pictures = open_pictures(describe(FAMILIES[architecture].pictures(config)))
    assert isinstance(pictures, AnyRes)
    rng, scaled = np.random.default_rng(0), 0
    for height, width in [*SIZES, *rng.integers(1, 2500, (40, 2)).tolist()]:
        rows, columns = pictures.grid(height, width)
        features = torch.from_numpy(rng.standard_normal((1 + rows * columns, pictures.side**2, 2), np.float32))
        mark = torch.tensor([5.0, -5.0])
        (expected,), (length,) = model.pack_image_features(
            SimpleNamespace(config=config), [features], torch.tensor([[height, width]]), image_newline=mark, **options
        )
        packing = pictures.packing(height, width)
        table = np.concatenate([features.flatten(0, 1).numpy(), mark[None].numpy()])
        weight = packing.get("pack_weight", np.ones((1, 1), np.float32))
        found = (table[packing["pack_index"]] * weight[:, :, None]).sum(1)
        # Places between cells round in FP32, where cells are counted to some hundreds.
        np.testing.assert_allclose(found, expected.numpy(), rtol=0, atol=1e-4)
        assert pictures.tokens(height, width) == int(length)
        scaled += bool((weight[:, 0] < 1).any())
    assert (scaled > 5) == bool(pictures.most_tiles)


@pytest.mark.parametrize("preset", ["tiny-llava-next", "tiny-llava-onevision", "tiny-pixtral", "tiny-mistral3"])
def test_inputs_of_the_model_are_those_of_its_processor(preset: str, tmp_path: Path) -> None:
    """Pictures are prepared one by one; transformers fills them up to the size of the largest."""
    config = preset_config(preset)
    write_processor(tmp_path, config)
    files, family = ProcessorFiles.load(tmp_path), FAMILIES[config.architectures[0]].variant(config)
    family.prepare_processor(files, config)
    pictures, given = open_pictures(describe(family.pictures(config))), [picture(150, 90, 1), picture(60, 130, 2)]
    encoded = [pictures.encode(files.images(images=[one], return_tensors="np"), "") for one in given]
    calls = [pictures.join([one]) for one in encoded]
    inputs = family.model_inputs(calls, [[(one.height, one.width)] for one in given])
    expected = files.images(images=given, return_tensors="np")
    assert set(inputs) == {"pixel_values", "image_sizes"}
    for name, array in inputs.items():
        np.testing.assert_array_equal(array, expected[name])


def test_pictures_that_the_model_cannot_take() -> None:
    pixels = np.zeros((1, 5, 3, 56, 56), np.float32)
    with pytest.raises(InputError, match="into 5 tiles, the model wants 3; fix image_grid_pinpoints"):
        AnyRes(4, 56, "1x2").encode({"pixel_values": pixels, "image_sizes": [[50, 100]]}, "")
    with pytest.raises(InputError, match="1 x 4 patches, of which 2 x 2 make a token; give a larger picture"):
        PatchRows(2, 14).encode({"pixel_values": pixels[:, 0], "image_sizes": [[14, 56]]}, "")


@pytest.mark.parametrize("grids", ["", "0x1", "2x", "1x2x3", "two"])
def test_grids_that_a_manifest_must_not_have(grids: str) -> None:
    with pytest.raises(BundleError, match="export the model again"):
        open_pictures(PictureInfo("anyres", {"side": 4, "tile_pixels": 56, "most_tiles": 0}, {"grids": grids}))


@pytest.mark.parametrize(
    "info",
    [
        PictureInfo("tiles", {"tile_tokens": 4, "a\nb": 1}, {}),
        PictureInfo("x\n" * 5000, {}, {}),
        PictureInfo("grid", {"merge": 0}, {}),
        PictureInfo("grid", {"merge": 2, "table": 4}, {"kernel": "magic"}),
        PictureInfo("anyres", {"side": 4096, "tile_pixels": 56}, {"grids": "9x9"}),
    ],
    ids=lambda info: info.kind[:6],
)
def test_pictures_that_cannot_be(info: PictureInfo) -> None:
    """In one line, whatever the manifest names."""
    with pytest.raises(BundleError) as caught:
        open_pictures(info)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 400


@pytest.mark.parametrize("tokens", [0, 1, 7, 300, 5000])
def test_made_up_pictures(tokens: int) -> None:
    """Not all numbers can be had; pictures are whole, and near what is asked for where they come in small steps."""
    tiles, rows = AnyRes(4, 56, "1x2 2x2 3x3"), PatchRows(2, 14)
    square = square_pixels(transformers.CLIPVisionConfig(), 56)
    patches = TensorSpec("pixel_values", "float32", (rows.pixel_rows, 3, 14, 14))
    for pictures, inputs in ((tiles, (*square, *tiles.inputs())), (rows, (patches, *rows.inputs()))):
        found = pictures.example(inputs, tokens)
        assert set(found.arrays) == {spec.name for spec in inputs}
        assert found.tokens == len(found.arrays["pack_index" if pictures is tiles else "merge_index"])
    assert max(1, tokens - tokens**0.5) <= found.tokens <= max(1, tokens)
