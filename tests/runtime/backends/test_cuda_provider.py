"""Bundles on onnxruntime's CUDA provider: the same tokens as on the CPU, the caches stay on the device."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from samples import Page

onnxruntime = pytest.importorskip("onnxruntime")
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        "CUDAExecutionProvider" not in onnxruntime.get_available_providers(),
        reason="needs an NVIDIA GPU and onnxruntime-gpu",
    ),
]

PROMPT = "USER: <image>\nTranscribe the page. ASSISTANT:"


@pytest.mark.parametrize("bits", [1, 2, 4, 8, 16])
def test_same_tokens_as_on_the_cpu(bundle_factory: Callable[..., Path], pages: list[Page], bits: int) -> None:
    from vkvx import Session

    bundle = bundle_factory(bits=bits)
    prompts, images = [PROMPT] * len(pages), [page.path for page in pages]
    texts = {}
    for provider in ("cpu", "cuda"):
        with Session.load(bundle, provider=provider, slots=3) as session:
            assert session.backend.provider == provider  # type: ignore[attr-defined]
            texts[provider] = [g.text for g in session.generate(prompts, images, max_new_tokens=32)]
            alone = session.generate(PROMPT, pages[1].path, max_new_tokens=32)
            assert alone.text == texts[provider][1]
    assert texts["cuda"] == texts["cpu"]


@pytest.mark.parametrize("options", [{"bits": 1}, {"bits": 4}, {"bits": 16}, {"bits": 1, "dtype": "float32"}])
def test_validates(bundle_factory: Callable[..., Path], options: dict[str, object]) -> None:
    from vkvx import validate_bundle

    report = validate_bundle(bundle_factory(**options), provider="cuda", steps=8)
    assert report.provider == "cuda"
    assert [check for check in report.checks if not check.passed] == []


def test_turns_and_forks(tiny_bundle: Path, pages: list[Page]) -> None:
    from vkvx import Session

    answers = {}
    for provider in ("cpu", "cuda"):
        with Session.load(tiny_bundle, provider=provider, slots=2) as session:
            talk = session.conversation()
            first = "".join(talk.ask("Transcribe the page.", [pages[0].path]))
            twin = talk.fork()
            later = ["".join(c.ask("Transcribe the page.", [pages[1].path])) for c in (talk, twin)]
            assert later[0] == later[1]
            answers[provider] = [first, *later]
    assert answers["cuda"] == answers["cpu"]
