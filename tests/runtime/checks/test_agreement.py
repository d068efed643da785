"""The whole model in onnxruntime against torch: two pages in two turns, each with a prefill and decode steps."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from vkvx import Manifest, validate_bundle
from vkvx.models.registry import sample_pages
from vkvx.runtime.backends.base import Backend
from vkvx.runtime.backends.onnxruntime.backend import OnnxRuntimeBackend
from vkvx.runtime.backends.torch.backend import TorchBackend
from vkvx.runtime.checks.comparison import TOLERANCES
from vkvx.runtime.checks.report import Report

# Every bit width, quantiser, score correction and dtype; `python -m benchmarks agreement` runs all combinations.
SETTINGS: list[dict[str, Any]] = [
    {"bits": 1},
    {"bits": 1, "dtype": "float32"},
    {"bits": 1, "dtype": "bfloat16"},
    {"bits": 2, "quantizer": "quantile", "score_correction": "affine", "text_bits": 8},
    {"bits": 4, "quantizer": "minmax", "score_correction": "none"},
    {"bits": 8, "quantizer": "shrink", "score_correction": "expected"},
    {"bits": 16},
    {"bits": 2},
    {"key_bits": 2, "value_bits": 1, "dtype": "float32", "text_bits": 8},
    {"bits_per_layer": "0:8,1-:1", "dtype": "float32", "quantizer": "quantile"},
]


@pytest.mark.parametrize("options", SETTINGS, ids=lambda o: "-".join(map(str, o.values())))
def test_onnxruntime_agrees_with_torch(bundle_factory: Callable[..., Path], options: dict[str, Any]) -> None:
    report = validate_bundle(bundle_factory(**options), provider="cpu", steps=64 if options == {"bits": 1} else 6)
    assert [check for check in report.checks if not check.passed] == []
    phases = {check.phase for check in report.checks}
    assert {"vision", "prefill", "decode 6", "turn 2 vision", "turn 2 prefill", "turn 2 decode 6"} <= phases


def test_the_documentation_states_the_tolerances() -> None:
    text = (Path(__file__).parents[3] / "docs" / "cli.md").read_text(encoding="utf-8")
    for dtype, tolerance in TOLERANCES.items():
        row = next(line for line in text.splitlines() if line.startswith(f"| {dtype} |"))
        embeds, logits, cache, outliers, *codes = (cell.strip() for cell in row.split("|")[2:-1])
        assert [float(cell) for cell in (embeds, logits, cache)] == [
            tolerance.vision,
            tolerance.logits,
            tolerance.cache,
        ]
        shares = [float(cell.removesuffix(" %")) / 100 for cell in (outliers, *codes)]
        assert shares == pytest.approx([tolerance.outliers, *(tolerance.codes[bits] for bits in (1, 2, 4, 8))])


def off(array: np.ndarray, share: float) -> None:
    """Put the first number off by a share of the range."""
    array.flat[0] += share * np.ptp(array)


WRONG: dict[str, Callable[[Backend, Any, np.ndarray], None]] = {
    "logits": lambda backend, call, logits: off(logits, 2e-5),
    "text_key": lambda backend, call, logits: off(backend.cache.buffers["1.text_key"][1, :, :8], 2e-3),
    "text_value": lambda backend, call, logits: off(backend.cache.buffers["0.text_value"][1, :, :8], 2e-3),
    "text_count": lambda backend, call, logits: np.add.at(backend.cache.text_count, 1, -1),
    "visual_key_error": lambda backend, call, logits: flip(backend, "1.visual_key"),
    "visual_value_error": lambda backend, call, logits: scaled(backend, "0.visual_value_params", 0, 4 / 3),
    "visual_key_rms": lambda backend, call, logits: scaled(backend, "1.visual_key_params", 2, 1.5),
}


def flip(backend: Backend, name: str) -> None:
    buffer: Any = backend.cache.buffers[name]
    buffer[1] ^= 0x11111111


def scaled(backend: Backend, name: str, row: int, factor: float) -> None:
    buffer: Any = backend.cache.buffers[name]
    buffer[1, :, :, row] *= np.float16(factor)


@pytest.mark.parametrize("name", [*WRONG, "image_embeds", "visual_key"])
def test_a_wrong_bundle_fails(mixed_bundle: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """At each of the tolerances, and nowhere before that."""
    step, encode = OnnxRuntimeBackend.step, OnnxRuntimeBackend.encode

    def wrong_step(self: Any, call: Any, embeds: Any) -> np.ndarray:
        logits = step(self, call, embeds)
        if name in WRONG and call.visual_index.size:
            WRONG[name](self, call, logits)
        elif name == "visual_key" and not call.visual_index.size:
            flip(self, "1.visual_key")  # of a picture that is there already
        return logits

    def wrong_encode(self: Any, inputs: Any) -> np.ndarray:
        embeds = encode(self, inputs).copy()
        if name == "image_embeds":
            off(embeds, 2e-4)
        return embeds

    monkeypatch.setattr(OnnxRuntimeBackend, "step", wrong_step)
    monkeypatch.setattr(OnnxRuntimeBackend, "encode", wrong_encode)
    report = validate_bundle(mixed_bundle, provider="cpu", images=[sample_pages()[0]], steps=1)
    first = next(check for check in report.checks if not check.passed)
    assert first.name == name
    assert first.phase == {"image_embeds": "vision", "visual_key": "decode 1"}.get(name, "prefill")


@pytest.mark.parametrize(("channel", "change", "name"), [(0, 2, "text_key"), (-1, 8, "text_key rounding")])
def test_wrong_text_rows_of_8_bits_fail(
    bundle_factory: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, channel: int, change: int, name: str
) -> None:
    """A code that is two steps off, and a scale that is, by 8 units in the last place, where both sides have it."""
    bundle = bundle_factory(**SETTINGS[8])
    for side in (OnnxRuntimeBackend,) if channel == 0 else (OnnxRuntimeBackend, TorchBackend):
        step = side.step

        def wrong_step(self: Any, call: Any, embeds: Any, step: Any = step) -> np.ndarray:
            logits = step(self, call, embeds)
            if call.visual_index.size:
                buffer = self.cache.read("1.text_key")
                buffer[1, 0, 3, channel] ^= change
                self.cache._storage.write(self.cache.buffers["1.text_key"], buffer)
            return logits

        monkeypatch.setattr(side, "step", wrong_step)
    report = validate_bundle(bundle, provider="cpu", images=[sample_pages()[0]], steps=1)
    first = next(check for check in report.checks if not check.passed)
    assert (first.name, first.phase, first.layer) == (name, "prefill", 1)


def test_a_wrong_checkpoint_is_noticed(tiny_bundle: Path, tmp_path: Path) -> None:
    """The comparison can fail: against a checkpoint with one changed weight it does, and names the layer."""
    import shutil

    from safetensors.numpy import load_file, save_file
    from samples import CHECKPOINT

    shutil.copytree(CHECKPOINT, tmp_path / "model")
    path = tmp_path / "model" / "model.safetensors"
    weights = load_file(path)
    name = next(n for n in weights if "language_model" in n and "layers.2.self_attn.k_proj" in n)
    weights[name] = weights[name] * 1.5
    save_file(weights, path, metadata={"format": "pt"})
    report: Report = validate_bundle(tiny_bundle, model=str(tmp_path / "model"), provider="cpu", steps=1)
    assert not report.passed
    assert report.first_divergent_layer == 2
    assert len(Manifest.load(tiny_bundle).model.layers) == 4
