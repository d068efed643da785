"""Every family against transformers' own processor and model, and engines of it.

Pictures of different sizes, a batch, a second turn, 1 bit; TensorRT for RTX builds vision and decoder. What these tests
tell of a checkpoint is a row of the matrix in docs/models.md; ``matrix.py`` has a column for each.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from engine_calls import build
from families import PICTURES, PROMPTS, ROOM, TALL, WIDE, Case, Recorded
from PIL import Image
from reference import Reference, joined

from vkvx import ExportOptions, evaluate, quantize_visual_cache
from vkvx.errors import BuildError, OptionError
from vkvx.manifest import Manifest
from vkvx.runtime.backends import golden
from vkvx.runtime.engines.manifest import VISION, EngineManifest
from vkvx.runtime.sessions.pieces import check_prefill_chunk
from vkvx.runtime.sessions.processor import PLACEHOLDER
from vkvx.runtime.sessions.session import Session

CAPABILITIES = ("8.9", "12.0")
"""Compute capabilities that an engine is built for."""
ATOL = 1e-4
"""Of logits in FP32, whose range is about 10."""
PACKED_SHARE = 0.05
"""Of what 1 bit changes: a last bit of FP32 may tip a scale to the next FP16 number or a code over its border, of some
thousands; all codes together make up the change."""


def reference_prompts(reference: Reference, prompts: Any = PROMPTS) -> list[str]:
    return [prompt.replace(PLACEHOLDER, reference.picture) for prompt in prompts]


def prepared_alone(
    reference: Reference, prompt: str, pictures: list[Image.Image], *, first: bool = True
) -> dict[str, torch.Tensor]:
    return reference.inputs(reference_prompts(reference, [prompt]), [pictures], first=first)


@pytest.fixture(scope="module")
def session(exact: Path) -> Any:
    with Session.load(exact, **ROOM, backend="onnxruntime") as opened:
        yield opened


def test_bundles_are_exported(exact: Path, packed: Path) -> None:
    for bundle, bits in ((exact, 16), (packed, 1)):
        assert set(Manifest.load(bundle).quantization.key_bits) == {bits}


def test_prompts_and_pixels_are_those_of_transformers(case: Case, reference: Reference, session: Session) -> None:
    for prompt, pictures in (*zip(PROMPTS, PICTURES, strict=True), ("No picture at all.", [])):
        expected = prepared_alone(reference, prompt, pictures)
        prepared = session.processor.prepare(prompt, pictures)
        assert prepared.token_ids.tolist() == expected["input_ids"][0].tolist()
        assert prepared.picture_lengths == tuple(case.tokens[one is TALL] for one in pictures)
        if not pictures:
            assert prepared.vision_calls == ()
            continue
        pixels = reference.pixels(expected)
        given = np.concatenate([call["pixel_values"] for call in prepared.vision_calls])
        np.testing.assert_array_equal(given, pixels.reshape(given.shape))


def test_greedy_answers_of_a_batch(reference: Reference, session: Session) -> None:
    """Rows of different lengths: transformers pads them, a session does not."""
    expected, logits = reference.generate(reference.inputs(reference_prompts(reference), PICTURES), 32)
    recorded = Recorded(session)
    answers = session.generate(list(PROMPTS), list(PICTURES), max_new_tokens=32, ignore_eos=True)
    for row, answer in enumerate(answers):
        assert list(answer.token_ids) == expected[row].tolist()
        np.testing.assert_allclose(np.stack(recorded.logits[row]), logits[row], rtol=0, atol=ATOL)


def test_second_turn_with_another_picture(reference: Reference, session: Session) -> None:
    if any(layer.visual_mask == "prefix" for layer in session.manifest.model.layers):
        pytest.skip("in one prompt, which transformers is given, the first turn sees the second")
    first = prepared_alone(reference, PROMPTS[1], [TALL])
    second = prepared_alone(reference, PROMPTS[0], [TALL, WIDE], first=False)
    answer, _ = reference.generate(first, 8)
    expected, logits = reference.generate(joined(first, answer[0], second), 8)
    with session.conversation() as conversation:
        assert conversation.generate(PROMPTS[1], TALL, max_new_tokens=8, ignore_eos=True).token_ids == tuple(answer[0])
        recorded = Recorded(session)
        later = conversation.generate(PROMPTS[0], [TALL, WIDE], max_new_tokens=8, ignore_eos=True)
        assert later.token_ids == tuple(expected[0])
        np.testing.assert_allclose(np.stack(recorded.logits[conversation.slot]), logits[0], rtol=0, atol=ATOL)


def test_prompts_in_pieces(session: Session, monkeypatch: pytest.MonkeyPatch) -> None:
    """At 16 bits a cut changes rounding only: positions, windows, features of layers and states go on behind it."""
    model = session.manifest.model
    masks = {layer.visual_mask for layer in model.layers}
    if "prefix" in masks:
        with pytest.raises(OptionError, match="--prefill-chunk"):
            check_prefill_chunk(session.manifest, model.max_positions)
        pytest.skip("prompts see themselves both ways")
    limit = max(24, model.usual_tokens if "run" in masks else 0)
    check_prefill_chunk(session.manifest, limit)
    prompts = [prompt + " and" * (limit if limit > 24 else 0) for prompt in PROMPTS]  # longer than a piece
    found = []
    for chunk in (None, limit):
        monkeypatch.setattr(session, "prefill_chunk", chunk)
        recorded = Recorded(session)
        answers = session.generate(prompts, list(PICTURES), max_new_tokens=4, ignore_eos=True)
        found.append([(one.token_ids, list(recorded.logits[row])) for row, one in enumerate(answers)])
    assert len(found[1][0][1]) > len(found[0][0][1]) == 4  # the first is long
    for (tokens, logits), (others, in_pieces) in zip(*found, strict=True):
        assert tokens == others
        np.testing.assert_allclose(np.stack(in_pieces[-4:]), np.stack(logits[-4:]), rtol=0, atol=ATOL)


def test_one_bit_is_that_of_the_plug_in(reference: Reference, packed: Path) -> None:
    manifest = Manifest.load(packed)
    inputs = reference.inputs(reference_prompts(reference), PICTURES)
    options = {"group_size": manifest.quantization.group_size, "text_bits": manifest.quantization.text_bits}
    with quantize_visual_cache(reference.model, bits=1, **options) as handle:
        assert handle.layout.quantization == manifest.quantization
        expected, logits = reference.generate(inputs, 16)
    _, exact = reference.generate(inputs, 16)
    with Session.load(packed, **ROOM, backend="onnxruntime") as session:
        recorded = Recorded(session)
        answers = session.generate(list(PROMPTS), list(PICTURES), max_new_tokens=16, ignore_eos=True)
        for row, answer in enumerate(answers):
            assert answer.token_ids == tuple(expected[row])
            found = np.stack(recorded.logits[row])
            effect = np.abs(logits[row, 1:] - exact[row, 1:]).max()
            assert effect > 100 * ATOL  # so that 16 bits would be noticed
            np.testing.assert_allclose(found[0], logits[row, 0], rtol=0, atol=ATOL)
            np.testing.assert_allclose(found, logits[row], rtol=0, atol=PACKED_SHARE * effect)


def test_evaluation_of_bundle_and_checkpoint(case: Case, packed: Path, family_checkpoint: Path, tmp_path: Path) -> None:
    """`vkvx eval` measures the same by onnxruntime and by the plug-in: pictures in a batch, positions, padding."""
    questions = tmp_path / "questions.jsonl"
    with questions.open("w") as file:
        for number, picture in enumerate((WIDE, TALL, WIDE)):
            picture.save(tmp_path / f"{number}.png")
            prompt = "Say what it is." if number else "What?"
            line = {"image": f"{number}.png", "prompt": prompt, "answers": ["no"]}
            file.write(json.dumps(line) + "\n")
    options: dict[str, Any] = {"data": questions, "device": "cpu", "max_new_tokens": 6, "batch": 2}
    ours = evaluate(packed, model=str(family_checkpoint), **options).to_json()["settings"][1]
    settings = [ExportOptions(text_bits=case.text_bits)]
    theirs = evaluate(family_checkpoint, settings=settings, dtype="float32", **options).to_json()["settings"][1]
    for name in ("token_agreement", "equal_answers", "bits_per_element", "visual_bytes"):
        assert ours[name] == theirs[name], name
    assert ours["kl"] == pytest.approx(theirs["kl"], rel=0.05, abs=1e-6)


def test_engines_are_built(case: Case, packed: Path, plugin_file: Path, tmp_path: Path) -> None:
    bundle = Path(shutil.copytree(packed, tmp_path / "bundle"))
    pytest.importorskip("tensorrt_rtx", reason="needs the package tensorrt-rtx-cu13")
    if Manifest.load(bundle).model.linear_layers:
        with pytest.raises(BuildError, match="linear attention"):
            build(bundle, plugin_file, compute_capabilities=CAPABILITIES)
        pytest.skip("refused: TensorRT for linear attention")
    result = build(bundle, plugin_file, compute_capabilities=CAPABILITIES)
    manifest, model = EngineManifest.load(result.directory), Manifest.load(bundle)
    manifest.check_bundle(bundle)
    assert manifest.engines["decoder"].plugin_layers == len(model.model.layers)
    (profile,) = (one for one in manifest.profiles if one.engine == VISION)
    for tokens in (0, min(model.model.usual_tokens, manifest.limits.pictures)):
        picture = golden.picture(model, tokens)
        assert all(profile.takes(name, np.shape(array)) for name, array in picture.arrays.items())
