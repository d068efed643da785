"""The golden sample of a bundle: recorded by the export, passed by onnxruntime, failed by what is broken."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from vkvx.errors import EngineError
from vkvx.manifest import Manifest
from vkvx.runtime.backends import golden
from vkvx.runtime.backends.base import Backend
from vkvx.runtime.backends.registry import open_backend


@pytest.fixture(scope="module", params=[1, 16])
def bundle(request: pytest.FixtureRequest, bundle_factory: Any) -> Path:
    return bundle_factory(bits=request.param)


@pytest.fixture
def backend(bundle: Path) -> Backend:
    manifest = Manifest.load(bundle)
    return open_backend("onnxruntime", bundle, manifest, slots=2, visual_tokens=640, text_tokens=32, provider="cpu")


def test_an_export_records_it_and_onnxruntime_passes(bundle: Path, backend: Backend) -> None:
    assert golden.FILE_NAME in Manifest.load(bundle).files
    assert "within 0 of" in golden.check(backend, [bundle / "nowhere", bundle])
    assert backend.cache.free_slots == (0, 1)


@pytest.mark.parametrize("lost", ["visual_value_params", "text_value", "visual_key", "counts"])
def test_a_cache_that_loses_something_fails(bundle: Path, backend: Backend, lost: str) -> None:
    """Zeros after the prefill, where an engine that stored nothing would have them."""
    if lost.startswith("visual") and not backend.manifest.layout.is_packed:
        pytest.skip("16 bits have no visual buffers")
    step = backend.step

    def forgetful(call: Any, embeds: Any) -> np.ndarray:
        logits = step(call, embeds)
        if embeds is not None:
            if lost == "counts":
                backend.cache.visual_count[:] = 0
                backend.cache.text_count[:] = 0
            for name, buffer in backend.cache.buffers.items():
                if name.endswith(lost):
                    buffer[...] = 0
        return logits

    backend.step = forgetful  # type: ignore[method-assign]
    with pytest.raises(EngineError, match="the decode of the golden sample"):
        golden.check(backend, [bundle])


def test_inputs_follow_from_the_manifest(bundle: Path) -> None:
    manifest = Manifest.load(bundle)
    picture = golden.picture(manifest)
    pixels = picture.arrays
    assert pixels["pixel_values"].shape == (1, 3, 336, 336)
    assert picture.tokens == manifest.model.tokens_per_picture
    assert np.abs(pixels["pixel_values"]).max() <= 1.01
    tokens = golden.text(manifest, 900)
    assert manifest.model.image_token_id not in tokens
    assert not set(manifest.model.eos_token_ids) & set(tokens)
    assert tokens[5:9] == golden.text(manifest, 4, 5)
