"""The models in the package beside tiny-llava read pages, at 16 and at 1 bit."""

from __future__ import annotations

import pytest

pytest.importorskip("sklearn")

from training.evaluate import samples
from vkvx.evaluation.run import evaluate
from vkvx.export.options import ExportOptions
from vkvx.models.registry import resolve
from vkvx.models.tiny_llava import data

NAMES = ("tiny-qwen", "tiny-intern")


@pytest.mark.parametrize("name", NAMES)
def test_whole_pages_are_read(name: str) -> None:
    assert (resolve(name).directory / "model.safetensors").stat().st_size < 12_000_000
    result = evaluate(name, settings=[ExportOptions(bits=1)], samples=3, device="cpu", dtype="float32")
    assert len(result.settings) == 2
    for setting in result.settings:
        assert setting.metrics["per_digit"].mean > 0.95, setting.name


@pytest.mark.parametrize("name", NAMES)
def test_parts_of_pages_are_read(name: str) -> None:
    """In batches of pictures of several sizes, the second one smaller than the first."""
    from vkvx.evaluation.torch_runner import TorchRunner

    runner = TorchRunner(resolve(name), "cpu", "float32", 40)
    asked = list(samples("parts", 5))
    for batch in (asked[:3], asked[3:]):
        answers = runner.start(batch, [None] * len(batch)).answers
        for sample, answer in zip(batch, answers, strict=True):
            assert data.right_digits(runner.text(answer), sample.answers[0]) > 0.95, sample.prompt
