"""Checks of a checkpoint's config and processor: tokens and bytes of pictures for every family, and what is refused."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
from families import CASES, Case

from vkvx.errors import ModelError, OptionError
from vkvx.format import typical_group_size
from vkvx.manifest import Manifest
from vkvx.models.preset_processors import write_processor
from vkvx.models.presets import preset_config
from vkvx.models.registry import TINY_LLAVA
from vkvx.runtime.checks.check import DEFAULT_PICTURES, check_model


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.preset)
def test_tokens_and_bytes_of_each_family(case: Case, tmp_path: Path) -> None:
    """Tokens are those that tests/families compares with transformers; nothing but config and processor is there."""
    config = preset_config(case.preset)
    config.save_pretrained(tmp_path)
    write_processor(tmp_path, config)
    found = check_model(tmp_path, [(150, 90), (60, 130)])
    assert (found.supported, found.reason) == (True, None)
    assert (found.name, found.decoder) == (tmp_path.name, config.text_config.model_type)
    assert tuple(picture.tokens for picture in found.pictures) == case.tokens
    size = found.group_size
    assert found.model is not None
    assert size == typical_group_size(found.model.typical_tokens)
    cached = [found.model.layers[i] for i in found.model.caches]
    heads_dim = sum(layer.kv_heads * layer.head_dim for layer in cached)
    for picture in found.pictures:
        assert picture.padded_tokens == size
        packed = {bits: heads_dim * (size * 2 * bits // 8 + 10) for bits in (1, 2, 4, 8)}
        assert picture.bytes == {**packed, 16: picture.tokens * heads_dim * 4}


def test_bytes_are_those_of_a_bundle(tiny_bundle: Path) -> None:
    layout = Manifest.load(tiny_bundle).layout
    found = check_model("tiny-llava")
    assert tuple((picture.width, picture.height) for picture in found.pictures) == DEFAULT_PICTURES
    assert found.group_size == layout.quantization.group_size
    assert {picture.tokens for picture in found.pictures} == {576}
    assert found.pictures[0].bytes[1] == layout.visual_bytes_per_picture()
    assert found.pictures[0].bytes[16] == layout.sixteen_bit_bytes_per_picture()


def test_options() -> None:
    found = check_model("tiny-llava", [(640, 480)], dtype="float32", group_size=256)
    (picture,) = found.pictures
    assert (found.group_size, picture.padded_tokens) == (256, 768)
    assert picture.bytes[16] == 2 * check_model("tiny-llava", [(640, 480)]).pictures[0].bytes[16]


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    """Config and processor files of tiny-llava to spoil."""
    for path in [*TINY_LLAVA.glob("*.json"), *TINY_LLAVA.glob("*.jinja")]:
        shutil.copy(path, tmp_path)
    return tmp_path


@pytest.mark.parametrize(
    ("name", "text", "reason"),
    [
        ("config.json", "{", "cannot read"),
        ("config.json", '{"architectures": ["BertModel"]}', "BertModel is not supported"),
        ("adapter_config.json", "{}", "merge_and_unload"),
        ("generation_config.json", "{", "cannot read"),
        ("processor_config.json", None, "holds no image processor: no preprocessor_config.json or processor_config"),
        ("tokenizer.json", None, "holds no tokenizer: no tokenizer.json, tokenizer.model or vocab.json"),
        ("tokenizer.json", "{", "cannot read the processor files"),
    ],
)
def test_what_cannot_be_exported_is_told(copy: Path, name: str, text: str | None, reason: str) -> None:
    (copy / name).unlink(missing_ok=True)
    if text is not None:
        (copy / name).write_text(text)
    found = check_model(copy)
    assert not found.supported
    assert reason in str(found.reason)
    assert "\n" not in str(found.reason)
    assert (found.model, found.pictures) == (None, ())


def test_a_processor_that_refuses_a_picture(monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    def refuse(self: Any, *_: Any, **__: Any) -> None:
        raise ValueError("aspect ratio must be smaller than 200")

    monkeypatch.setattr(CLIPImageProcessorPil, "__call__", refuse)
    found = check_model("tiny-llava", [(640, 480)])
    assert "a picture of 640x480 pixels: the image processor refuses the picture: aspect" in str(found.reason)


def test_where_there_is_nothing_to_check(tmp_path: Path) -> None:
    for name in ("no-such-model", tmp_path / "absent", tmp_path):
        with pytest.raises(ModelError):
            check_model(name)
    for size in ((0, 5), (15, 100), (100, 8193)):
        with pytest.raises(OptionError, match=rf"{size[0]}x{size[1]} pixels .*16 to 8192"):
            check_model("tiny-llava", [size])
    with pytest.raises(OptionError, match="group size 100"):
        check_model("tiny-llava", group_size=100)
