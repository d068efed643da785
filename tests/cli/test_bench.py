"""``vkvx bench``: figures of backends on a CPU, and what it refuses."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fakes import FakeBackend, manifest

from vkvx.errors import OptionError
from vkvx.manifest import Manifest
from vkvx.runtime.checks import bench
from vkvx.runtime.checks.bench import Latency, Load, bench_bundle, resident_bytes, time_backend

SMALL = ("--steps", 3, "--repeats", 2, "--prompt-tokens", 5, "--threads", 1, "--no-verify")


def test_json_of_onnxruntime(cli: Callable, tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench, "resident_bytes", iter((10, 25)).__next__)
    chunk = Manifest.load(tiny_bundle).quantization.group_size
    options = ("--batch-size", 2, "--pictures", 2, "--prefill-chunk", chunk)
    done = cli("bench", tiny_bundle, "--backend", "onnxruntime", *options, "--json", *SMALL)
    assert done.code == 0, done.err
    found = json.loads(done.out)
    load = Load(2, 2, 5, 3, 2, prefill_chunk=chunk)
    assert found["load"] == vars(load)
    (result,) = found["results"]
    assert (result["backend"], result["provider"], result["reason"]) == ("onnxruntime", "cpu", "it was asked for")
    assert (result["vision"]["count"], result["prefill"]["count"], result["decode"]["count"]) == (2, 2, 6)
    for kind in ("vision", "prefill", "decode"):
        figures = result[kind]
        assert 0 < figures["p50"] <= figures["p90"] <= figures["p99"]
    assert result["prefill"]["p50"] > result["decode"]["p50"]
    assert result["tokens_per_second"] == pytest.approx(2000 / result["decode"]["mean"])
    manifest = Manifest.load(tiny_bundle)
    text = (5 + 3) * manifest.layout.text_bytes_per_token
    assert result["cache_bytes_used"] == 2 * (2 * manifest.layout.visual_bytes_per_picture() + text)
    assert result["cache_bytes_used"] <= result["cache_bytes_allocated"]
    assert result["process_bytes"] == 15
    assert result["device_bytes"] is None


def test_a_table_and_the_backends_that_are_not_there(
    cli: Callable, tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    done = cli(
        "bench", tiny_bundle, "--backend", "all", "--provider", "cpu", "--pictures", 0, *SMALL[:-3], "--no-verify"
    )
    assert done.code == 0, done.err
    assert "decode step ms" in done.out
    assert "vision" not in done.out
    assert "onnxruntime on CPU: " in done.out
    assert "torch on CPU: " in done.out
    for name in ("tensorrt", "rtx"):
        assert f"{name} was not timed: " in done.err


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--steps", 0), "--steps must be at least 1"),
        (("--batch-size", 0), "--batch-size must be at least 1"),
        (("--pictures", -1), "--pictures must be at least 0"),
        (("--pictures", 7), "sequences of 4128 tokens are longer than the 4096 positions"),
        (("--backend", "all", "--backend", "torch"), "--backend all is every backend"),
        (("--backend", "tensorrt"), "has no engines of 'tensorrt'; run `vkvx build"),
        (("--backend", "tensorrt", "--provider", "cpu"), "engines run on a GPU, not with provider='cpu'"),
    ],
)
def test_refusals(cli: Callable, tiny_bundle: Path, options: tuple[object, ...], words: str) -> None:
    done = cli("bench", tiny_bundle, "--no-verify", *options)
    assert done.code == 2
    assert words in done.err
    assert len(done.err.strip().splitlines()) == 1
    assert done.out == ""


def test_percentiles_are_those_of_numpy() -> None:
    seconds = np.random.default_rng(1).random(37)
    latency = Latency.of(seconds.tolist())
    assert latency.count == 37
    assert latency.mean == pytest.approx(1000 * seconds.mean())
    assert (latency.p50, latency.p90, latency.p99) == pytest.approx(
        tuple(1000 * np.quantile(seconds, (0.5, 0.9, 0.99)))
    )
    with pytest.raises(OptionError, match="--repeats"):
        Load(repeats=0)


def test_progress_counts_every_step(tiny_bundle: Path) -> None:
    seen: list[tuple[str, int, int]] = []
    load = Load(batch_size=1, pictures=0, prompt_tokens=4, steps=2, repeats=1)
    bench_bundle(
        tiny_bundle, "onnxruntime", load, provider="cpu", verify=False, progress=lambda *step: seen.append(step)
    )
    assert seen == [("bench onnxruntime", done, 6) for done in range(1, 7)]
    assert resident_bytes() is None or resident_bytes() > 1 << 20  # type: ignore[operator]


@pytest.mark.parametrize("chunk", [None, 160])
def test_prompts_that_come_back_in_parts(monkeypatch: pytest.MonkeyPatch, chunk: int | None) -> None:
    monkeypatch.setattr(FakeBackend, "samples", True)
    monkeypatch.setattr(FakeBackend, "parts", 3)
    backend: Any = FakeBackend(manifest(), 1)
    load = Load(pictures=0, prompt_tokens=300, steps=3, repeats=1, prefill_chunk=chunk)
    _, prefill, decode, _ = time_backend(backend, load)
    assert (len(prefill), len(decode)) == (1, 3)
    pieces = 1 if chunk is None else 2
    assert backend.parts_seen == [2, 1, 0] * pieces * 2  # a round that does not count, and one that does
    assert len(backend.calls) == 2 * (pieces + 3)
