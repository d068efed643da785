"""Pieces of prompts as CUDA graphs: what eager calls give, and what whole prompts give where nothing is packed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from families import PICTURES, PROMPTS, Recorded
from samples import Page
from test_captured_steps import PROMPT, fill, opened

from vkvx import ExportOptions
from vkvx.manifest import Graph, Manifest
from vkvx.models.presets import preset_config
from vkvx.models.random_checkpoint import write_checkpoint
from vkvx.models.registry import resolve
from vkvx.runtime.backends import golden
from vkvx.runtime.backends.torch.backend import TorchBackend
from vkvx.runtime.backends.torch.loading import load_reference
from vkvx.runtime.sessions.processor import Processor
from vkvx.runtime.sessions.session import Session

pytestmark = [pytest.mark.gpu, pytest.mark.kernels]

CHUNK = 640
PRESETS = ("tiny-qwen2.5-vl", "tiny-qwen3-vl", "tiny-qwen3.5", "tiny-pixtral", "tiny-gemma3", "tiny-gemma4-e")
"""Positions in time, rows and columns; features of layers; linear attention; text within pictures; windows."""


@pytest.mark.parametrize(("bits", "quantizer"), [(1, "shaped"), (4, "lloyd"), (16, "")])
def test_pieces_as_eager(pages: list[Page], monkeypatch: pytest.MonkeyPatch, bits: int, quantizer: str) -> None:
    """Random bits lie past the counts. The prompts' lengths differ, and so do the graphs; text alone has one, too."""
    monkeypatch.setattr(TorchBackend, "samples", False)  # logits come to the host, and are recorded
    prompts = [PROMPT.replace("<image>", "<image><image>"), PROMPT, "USER: 2 plus 3?" * 4, PROMPT]
    pictures = [[pages[0].path, pages[1].path], [pages[2].path], None, [pages[3].path]]
    found: list[Any] = []
    for captured in (True, False):
        with opened(bits, "float32", quantizer, slots=2) as (session, backend):
            session.prefill_chunk = CHUNK
            fill(backend, seed=int(captured))
            if captured:
                backend.capture_prefills(CHUNK)
            for prompt, given in zip(prompts, pictures, strict=True):
                recorded = Recorded(session)
                answer = session.generate(prompt, given, max_new_tokens=20)
                found.append((answer.text, np.stack(recorded.logits[0])))
            if captured:
                assert backend._prefills is not None
                assert set(backend._prefills.graphs) == {128, 640}
            assert (backend._prefills is not None) == captured
    limit = golden.TOLERANCES["float32"][1]
    for (text, logits), (expected, eager) in zip(found[:4], found[4:], strict=True):
        assert text == expected
        assert golden.difference(logits, eager).max() <= limit


def test_a_prompt_that_is_captured_waits_for_nothing(pages: list[Page]) -> None:
    with opened(dtype="float32") as (session, backend):
        session.prefill_chunk = CHUNK
        expected = session.generate([PROMPT] * 3, [page.path for page in pages[:3]], max_new_tokens=12)
        backend.capture_prefills(CHUNK)
        session.generate(PROMPT, pages[0].path, max_new_tokens=2)
        assert backend._prefills is not None
        assert len(backend._prefills.graphs) == 1
        try:
            torch.cuda.set_sync_debug_mode("error")
            request = session.stream(PROMPT, pages[0].path, max_new_tokens=1)
            assert next(request).token_ids == expected[0].token_ids[:1]
        finally:
            torch.cuda.set_sync_debug_mode("default")
        found = session.generate([PROMPT] * 3, [page.path for page in pages[:3]], max_new_tokens=12)
        assert [one.text for one in found] == [one.text for one in expected]


@pytest.mark.parametrize("preset", PRESETS)
def test_families_in_pieces(preset: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """At 16 bits a cut changes rounding only."""
    monkeypatch.setattr(TorchBackend, "samples", False)
    write_checkpoint(tmp_path / preset, preset_config(preset), dtype="float32", seed=1)
    source = resolve(str(tmp_path / preset))
    info = source.info("float32")
    quantization = ExportOptions(bits=16, dtype="float32").resolve(info.cached_layers, info.typical_tokens)
    graphs = {"vision": Graph("", 18, source.family.pixel_inputs(source.config), ())}
    manifest = Manifest("", 1, info, quantization, graphs, ".", {})
    backend = load_reference(source, manifest, device="cuda", slots=2, visual_tokens=1024, text_tokens=512)
    found = []
    with Session(manifest, backend, Processor.of_checkpoint(source, info)) as session:
        for chunk in (None, 24):
            session.prefill_chunk = chunk
            if chunk is not None:
                backend.capture_prefills(chunk)
                assert (backend._prefills is None) == bool(info.linear_layers)
            for prompt, pictures in zip(PROMPTS, PICTURES, strict=True):
                recorded = Recorded(session)
                answer = session.generate(prompt, pictures, max_new_tokens=4, ignore_eos=True)
                found.append((answer.token_ids, np.stack(recorded.logits[0][-4:]), len(recorded.logits[0])))
        assert bool(backend._prefills and backend._prefills.graphs) == (not info.linear_layers)
    assert found[2][2] > found[0][2] == 4
    for (tokens, logits, _), (others, in_pieces, _) in zip(found[:2], found[2:], strict=True):
        assert tokens == others
        np.testing.assert_allclose(in_pieces, logits, rtol=0, atol=1e-4)  # of FP32 logits, whose range is about 10
