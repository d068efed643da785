"""Numbers that FP16 cannot hold: the part of the model that they come from, and what helps."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from fakes import FakeBackend, FakeProcessor, manifest, widened
from safetensors.numpy import load_file, save_file
from samples import CHECKPOINT, Page

from vkvx import validate_bundle
from vkvx.errors import NumericError
from vkvx.manifest import FILE_NAME, sha256
from vkvx.runtime.sessions import nonfinite
from vkvx.runtime.sessions.session import Session

WEIGHTS = "model.safetensors"
PROJECTOR, DOWN = "multi_modal_projector.linear_2.weight", "layers.1.mlp.down_proj.weight"


def heat(directory: Path, name: str) -> None:
    """Make a weight of a checkpoint or a bundle so large that what it gives leaves the range of FP16."""
    weights = load_file(directory / WEIGHTS)
    (found,) = [key for key in weights if key.endswith(name) and "vision" not in key]
    weights[found] = (weights[found].astype(np.float32) * 1e5).clip(-6e4, 6e4).astype(np.float16)
    save_file(weights, directory / WEIGHTS, metadata={"format": "pt"})


@pytest.fixture
def bundle(tiny_bundle: Path, own_copy: Callable[[Path], Path]) -> Callable[[str], Path]:
    def make(name: str) -> Path:
        copy = own_copy(tiny_bundle)
        heat(copy, name)
        manifest = json.loads((copy / FILE_NAME).read_text(encoding="utf-8"))
        manifest["files"][WEIGHTS]["sha256"] = sha256(copy / WEIGHTS)
        (copy / FILE_NAME).write_text(json.dumps(manifest), encoding="utf-8")
        return copy

    return make


def test_a_vision_tower_that_overflows(bundle: Callable, pages: list[Page], tmp_path: Path) -> None:
    """`run` names it, and so does `validate`, before any layer."""
    hot = bundle(PROJECTOR)
    with Session.load(hot, backend="onnxruntime", provider="cpu") as session:
        with pytest.raises(NumericError, match=r"vision tower gives for picture 1; .* --dtype bfloat16 or float32$"):
            session.generate("<image>What?", pages[0].path, max_new_tokens=2)
        assert session.generate("USER: How many rows has a page? ASSISTANT:", max_new_tokens=2).token_ids
    shutil.copytree(CHECKPOINT, tmp_path / "model")
    heat(tmp_path / "model", PROJECTOR)
    report = validate_bundle(hot, str(tmp_path / "model"), [pages[0].path], steps=1, provider="cpu")
    assert (report.passed, report.first_divergence) == (False, "the vision output")
    assert report.remedy == nonfinite.OVERFLOW
    first = json.loads(json.dumps(report.to_json(), allow_nan=False))["checks"][0]
    assert (first["name"], first["max_difference"], first["is_finite"]) == ("image_embeds", None, False)


def test_a_decoder_that_overflows(bundle: Callable) -> None:
    with (
        Session.load(bundle(DOWN), backend="torch", provider="cpu") as session,
        pytest.raises(NumericError, match=r"is what decoder layer 2 puts into the cache; .* float16"),
    ):
        session.generate("USER: How many? ASSISTANT:", max_new_tokens=2)


def test_the_picture_that_is_meant_and_what_helps() -> None:
    for dtype, words in (("float16", "--dtype bfloat16"), ("bfloat16", "vkvx validate"), ("float32", "vkvx validate")):
        backend = FakeBackend(widened(replace(manifest()), dtype), 1)
        session = Session(backend.manifest, backend, FakeProcessor())  # type: ignore[arg-type]
        backend.nan_after = "]"
        with pytest.raises(NumericError, match=f"is what follows the last cache; .*{words}"):
            session.generate("[a]", max_new_tokens=2)
        with pytest.raises(NumericError, match=f"vision tower gives for picture 2; .*{words}"):
            session.generate("<image>[<image>]", [1.0, np.inf], max_new_tokens=2)
        assert session.backend.cache.free_slots == (0,)
