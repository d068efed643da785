"""``vkvx calibrate`` and ``vkvx export --metrics`` as a user runs them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from samples import Page

from vkvx.cli.inspect import _metrics_lines


@pytest.fixture
def questions(tmp_path: Path, pages: list[Page]) -> Path:
    path = tmp_path / "questions.jsonl"
    line = {"image": str(pages[0].path), "prompt": "Read row 2."}
    path.write_text(f"{json.dumps(line)}\n" * 4, encoding="utf-8")
    return path


def test_summary(cli: Callable, checkpoint: Path, questions: Path, tmp_path: Path) -> None:
    file = tmp_path / "metrics.safetensors"
    arguments = ("calibrate", checkpoint, "--data", questions, "--max-new-tokens", 3, "-o", file)
    result = cli(*arguments, "--device", "cpu")
    assert result.code == 0, result.err
    metrics, recorded, following = result.out.splitlines()
    assert metrics == f"metrics       {file}, {file.stat().st_size / 1024:.1f} KiB"
    assert recorded == "recorded      4 answers of 8 tokens to questions.jsonl, 4 of them now"
    assert following == f"next          vkvx export {checkpoint} --metrics {file}"
    assert "calibrate: load" in result.err
    again = cli(*arguments, "--device", "cpu", "--json")
    assert json.loads(again.out) == {
        "path": str(file),
        "model": "tiny-random",
        "data": "questions.jsonl",
        "device": "cpu",
        "dtype": "float32",
        "samples": 4,
        "tokens": 8,
        "recorded": 0,
    }


def test_refusals(cli: Callable, checkpoint: Path, tmp_path: Path) -> None:
    result = cli("calibrate", checkpoint, "-o", tmp_path / "m.safetensors")
    assert (result.code, result.out) == (2, "")
    assert result.err.startswith("vkvx: error: there are no pictures to calibrate")
    result = cli("export", checkpoint, "--metrics", tmp_path / "none", "-o", tmp_path / "b", "--json")
    assert result.code == 2
    assert json.loads(result.out)["error"]["message"].startswith("no file at")
    assert not list(tmp_path.iterdir())


def test_what_inspect_says() -> None:
    found = {"source": "calibration", "data": "a.jsonl", "samples": 16, "tokens": 480}
    assert _metrics_lines(found) == ["  metrics from the weights, and 16 answers of 480 tokens to a.jsonl"]
    assert _metrics_lines({"source": "weights"}) == ["  metrics from the weights"]
    assert _metrics_lines(None) == []
