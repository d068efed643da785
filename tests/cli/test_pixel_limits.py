"""Limits of the pixels of pictures: what the image processor makes with them, and what follows from its own."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from families import WIDE
from PIL import Image
from transformers import AutoImageProcessor

from vkvx import ExportOptions, Session, export_model
from vkvx.errors import CapacityError, OptionError
from vkvx.manifest import Manifest
from vkvx.models.pictures.limits import PixelLimits
from vkvx.models.preset_processors import write_processor
from vkvx.models.presets import preset_config
from vkvx.models.qwen_vl import USUAL_SIZES
from vkvx.models.random_checkpoint import write_checkpoint
from vkvx.models.registry import resolve
from vkvx.runtime.checks.check import check_model
from vkvx.runtime.sessions.processor import PLACEHOLDER, Processor

LIMITED = ("tiny-qwen2-vl", "tiny-qwen2.5-vl", "tiny-qwen3-vl", "tiny-glm-4.1v", "tiny-glm-4.6v", "tiny-paddleocr-vl")
LEAST, MOST = 40_000, 60_000


def files(directory: Path, preset: str) -> Path:
    config = preset_config(preset)
    config.save_pretrained(directory)
    write_processor(directory, config)
    return directory


def theirs(directory: Path, picture: Any, **limits: int) -> dict[str, np.ndarray]:
    processor = AutoImageProcessor.from_pretrained(directory, backend="pil")
    return processor(images=[picture], return_tensors="np", **({"size": limits} if limits else {}))


@pytest.mark.parametrize("preset", LIMITED)
def test_pixels_are_those_of_transformers(preset: str, tmp_path: Path) -> None:
    """Limits of an export and of a call: the same as the size that transformers' processor is called with."""
    directory = files(tmp_path, preset)
    source = resolve(directory, weights=False)
    limits = PixelLimits(LEAST, MOST)
    own, set_ = (Processor.of_checkpoint(s, s.info("float32")) for s in (source, replace(source, limits=limits)))
    expected = theirs(directory, WIDE, shortest_edge=LEAST, longest_edge=MOST)["pixel_values"]
    assert len(expected) != len(theirs(directory, WIDE)["pixel_values"])
    for prepared in (set_.prepare(PLACEHOLDER, [WIDE]), own.prepare(PLACEHOLDER, [WIDE], limits=limits)):
        (call,) = prepared.vision_calls
        np.testing.assert_array_equal(call["pixel_values"], expected.reshape(call["pixel_values"].shape))


@pytest.mark.parametrize("preset", LIMITED)
def test_typical_tokens_follow_the_limits(preset: str, tmp_path: Path) -> None:
    directory = files(tmp_path, preset)
    limits = PixelLimits(max_pixels=300_000)
    source = resolve(directory, weights=False)
    for given in (source, replace(source, limits=limits)):
        info = given.info("float32")
        processor = Processor.of_checkpoint(given, info)
        pictures = [Image.new("RGB", size[::-1]) for size in USUAL_SIZES]
        found = [processor.prepare(PLACEHOLDER, [one]).picture_lengths[0] for one in pictures]
        assert info.typical_tokens == tuple(sorted(found))
    checked = check_model(directory, [(1920, 1080)], max_pixels=300_000)
    assert checked.model is not None
    assert checked.pictures[0].tokens in info.typical_tokens
    assert checked.model.typical_tokens == info.typical_tokens


@pytest.mark.parametrize(
    ("limits", "words"),
    [
        (PixelLimits(0), "must be at least 1"),
        (PixelLimits(2000, 1000), "is more than max_pixels= (--max-pixels) 1000"),
        (PixelLimits(max_pixels=783), "less than the 784 pixels of a visual token"),
        (PixelLimits(max_pixels=2000), "at least 3136 and at most 2000 pixels of a picture; give min_pixels="),
        (PixelLimits(min_pixels=2_000_000), "give max_pixels= (--max-pixels) as well"),
        (PixelLimits(10**11, 10**11), "makes at least 127551020 visual tokens of a picture, the model knows"),
    ],
)
def test_wrong_limits(limits: PixelLimits, words: str, tmp_path: Path) -> None:
    source = resolve(files(tmp_path, "tiny-qwen2-vl"), weights=False)
    with pytest.raises(OptionError) as caught:
        replace(source, limits=limits).info("float32")
    assert words in str(caught.value)


@pytest.mark.parametrize("preset", LIMITED)
def test_pictures_without_room_become_no_pixels(preset: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = resolve(files(tmp_path, preset), weights=False)
    processor = Processor.of_checkpoint(source, source.info("float32"))
    limits = PixelLimits(max_pixels=10**8)
    fitting = processor.prepare(PLACEHOLDER * 2, [WIDE] * 2, limits=limits)
    tokens = fitting.picture_lengths[0]
    again = processor.prepare(PLACEHOLDER * 2, [WIDE] * 2, limits=limits, room=2 * tokens)
    assert again.picture_lengths == fitting.picture_lengths == (tokens, tokens)
    made, features = [], processor._features
    monkeypatch.setattr(processor, "_features", lambda *given: made.append(1) or features(*given))
    words = f"picture 2, which makes {tokens} visual tokens: the cache holds {2 * tokens - 1}, .* take {tokens};"
    with pytest.raises(CapacityError, match=words):
        processor.prepare(PLACEHOLDER * 2, [WIDE] * 2, limits=limits, room=2 * tokens - 1)
    assert len(made) == 1


@pytest.mark.parametrize("preset", ["tiny-llava-next", "tiny-internvl", "tiny-pixtral", "tiny-idefics3"])
def test_pictures_without_such_limits(preset: str, tmp_path: Path) -> None:
    source = resolve(files(tmp_path, preset), weights=False)
    with pytest.raises(OptionError, match="suit models alone whose pictures keep their proportions"):
        replace(source, limits=PixelLimits(max_pixels=5000)).info("float32")


def test_bundle_run_and_check(cli: Callable[..., Any], tmp_path: Path) -> None:
    """The bundle keeps the limits, a call may set others, narrower or wider."""
    checkpoint, bundle, picture = tmp_path / "checkpoint", tmp_path / "bundle", tmp_path / "wide.png"
    write_checkpoint(checkpoint, preset_config("tiny-qwen2-vl"), dtype="float32")
    WIDE.save(picture)
    export_model(checkpoint, bundle, ExportOptions(dtype="float32", bits=16, max_pixels=8000))
    size = AutoImageProcessor.from_pretrained(bundle / "processor", backend="pil").size
    assert dict(size) == {"shortest_edge": 3136, "longest_edge": 8000}
    assert Manifest.load(bundle).model.typical_tokens == (6, 6, 8)
    with Session.load(bundle, visual_tokens=1024, text_tokens=64, backend="onnxruntime") as session:
        for least, most in ((3136, 8000), (3136, 4000), (50_000, 60_000)):
            options: dict[str, Any] = {"max_new_tokens": 1, "min_pixels": least, "max_pixels": most}
            answer = session.generate(f"{PLACEHOLDER}What?", WIDE, **options)
            expected = theirs(checkpoint, WIDE, shortest_edge=least, longest_edge=most)["pixel_values"]
            assert answer.visual_tokens == len(expected) // 4
    run = ("run", bundle, "What?", "--image", picture, "--max-new-tokens", "1", "--json")
    assert '"visual_tokens": 2,' in cli(*run, "--max-pixels", "4000").out
    for arguments, words in (
        (run, "give min_pixels= (--min-pixels) as well"),
        (("export", checkpoint, "-o", tmp_path / "other"), "give min_pixels= (--min-pixels) as well"),
        (("check", checkpoint), "give min_pixels= (--min-pixels) as well"),
        (("plan", checkpoint, "--gpu-memory", "1GiB"), "give min_pixels= (--min-pixels) as well"),
    ):
        result = cli(*arguments, "--max-pixels", "3000")
        assert result.code == 2
        assert words in result.err
        assert (json.loads(result.out)["error"]["exit_code"] == 2) if arguments is run else result.out == ""
    for verb in (("export", "tiny-llava", "-o", tmp_path / "no"), ("check", "tiny-llava")):
        result = cli(*verb, "--max-pixels", "3000")
        assert (result.code, result.out, result.err.count("\n")) == (2, "", 1)
        assert "this one is none; leave them out" in result.err
