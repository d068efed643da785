"""The whole model in onnxruntime against torch: two pages in two turns, each with a prefill and decode steps."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from vkvx import Manifest, validate_bundle
from vkvx.runtime.checks.validate import TOLERANCES, Report

# Every bit width, quantiser, score correction and dtype; `python -m benchmarks agreement` runs all combinations.
SETTINGS: list[dict[str, Any]] = [
    {"bits": 1},
    {"bits": 1, "dtype": "float32"},
    {"bits": 1, "dtype": "bfloat16"},
    {"bits": 2, "quantizer": "quantile", "score_correction": "affine"},
    {"bits": 4, "quantizer": "minmax", "score_correction": "none"},
    {"bits": 8, "quantizer": "shrink", "score_correction": "expected"},
    {"bits": 16},
    {"bits": 2},
    {"key_bits": 2, "value_bits": 1, "dtype": "float32"},
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
        embeds, logits, cache, *codes = (cell.strip() for cell in row.split("|")[2:-1])
        assert [float(cell) for cell in (embeds, logits, cache)] == [
            tolerance.vision,
            tolerance.logits,
            tolerance.cache,
        ]
        shares = [float(cell.removesuffix(" %")) / 100 for cell in codes]
        assert shares == pytest.approx([tolerance.codes[bits] for bits in (1, 2, 4, 8)])


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
