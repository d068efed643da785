"""Whole evaluations: results, going on after an interruption, bundles, sensitivity."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import vkvx
from vkvx import CapacityError, ExportOptions, ModelError, OptionError, Session, StorageError, evaluate
from vkvx.evaluation import run as module
from vkvx.evaluation.bundle_runner import _follow
from vkvx.evaluation.report import table
from vkvx.evaluation.sensitivity import Step, choose, measure_sensitivity, write_bits_per_layer
from vkvx.evaluation.tasks import open_task, prepare, prompt_of
from vkvx.options import parse_bits_per_layer

FAST = {"device": "cpu", "dtype": "float32", "max_new_tokens": 12, "batch": 1}


def without_times(document: dict[str, Any]) -> dict[str, Any]:
    return {**document, "settings": [{**setting, "seconds": 0} for setting in document["settings"]]}


@pytest.fixture(scope="module")
def document(questions: Path) -> dict[str, Any]:
    return evaluate("tiny-llava", data=questions, settings=[ExportOptions()], **FAST).to_json()


def test_document(document: dict[str, Any]) -> None:
    assert json.loads(json.dumps(document)) == document
    assert list(document) == [
        *("format", "version", "vkvx_version", "target", "kind", "device", "dtype", "task", "samples", "environment"),
        *("settings", "histograms"),
    ]
    assert (document["format"], document["version"], document["vkvx_version"]) == ("vkvx-eval", 1, vkvx.__version__)
    assert (document["target"], document["kind"], document["device"]) == ("tiny-llava", "torch", "cpu")
    assert (document["dtype"], document["task"], document["samples"]) == ("float32", "questions.jsonl", 2)
    reference, packed = document["settings"]
    assert list(packed) == [
        *("name", "options", "reference", "metrics", "token_agreement", "equal_answers", "kl", "attention_error"),
        *("bits_per_element", "visual_bytes", "seconds"),
    ]
    assert (reference["name"], reference["options"], reference["reference"]) == ("16 bits", {"bits": 16}, True)
    assert (packed["name"], packed["options"], packed["reference"]) == ("1 bit, shaped, expected", {"bits": 1}, False)
    assert [setting["kl"] is None for setting in document["settings"]] == [True, False]
    assert set(packed["metrics"]) == {"exact", "f1"}
    for setting in document["settings"]:
        for metric in setting["metrics"].values():
            assert list(metric) == ["mean", "low", "high", "difference", "difference_low", "difference_high"]
            assert 0 <= metric["low"] <= metric["mean"] <= metric["high"] <= 1
    difference = packed["metrics"]["f1"]["mean"] - reference["metrics"]["f1"]["mean"]
    assert packed["metrics"]["f1"]["difference"] == pytest.approx(difference)
    assert len(packed["attention_error"]) == 4
    assert all(len(heads) == 4 and all(0 < error < 1 for error in heads) for heads in packed["attention_error"])
    assert packed["bits_per_element"] == pytest.approx(85 * 1024 * 8 / (576 * 1024))
    assert packed["visual_bytes"] == 1.5 * 85 * 1024
    assert len(document["histograms"]) == 4


def test_a_run_that_was_interrupted_goes_on(
    questions: Path, document: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = tmp_path / "records.jsonl"
    arguments = {"data": questions, "settings": [ExportOptions()], "output": output, **FAST}
    reported = []

    def interrupt(stage: str, done: int, total: int) -> None:
        reported.append((stage, done, total))
        if done == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        evaluate("tiny-llava", progress=interrupt, **arguments)
    assert reported[-1] == ("evaluate", 3, 4)
    lines = output.read_text(encoding="utf-8").splitlines(keepends=True)
    kept = [(entry["sample"], entry["setting"]) for entry in map(json.loads, lines[1:])]
    assert kept == [(0, "16 bits"), (0, "1 bit, shaped, expected"), (1, "16 bits")]
    output.write_text("".join(lines[:-1]) + lines[-1][:100], encoding="utf-8")  # killed while it wrote
    result = evaluate("tiny-llava", **arguments)
    assert without_times(result.to_json()) == without_times(document)
    assert output.read_text(encoding="utf-8").splitlines(keepends=True)[:3] == lines[:3]

    monkeypatch.setattr(module, "_Engine", None)  # all is there: no model is loaded
    assert evaluate("tiny-llava", **arguments).to_json() == result.to_json()
    before = output.read_bytes()
    with pytest.raises(StorageError, match="its longest answer: 12, now 13"):
        evaluate("tiny-llava", **{**arguments, "max_new_tokens": 13})
    with pytest.raises(StorageError, match="its settings: "):
        evaluate("tiny-llava", **{**arguments, "settings": [ExportOptions(bits=2)]})
    assert output.read_bytes() == before


def test_a_full_gpu(questions: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(module._Engine, "measure", fail)
    with pytest.raises(CapacityError, match="for 1 samples at a time; lower batch="):
        evaluate("tiny-llava", data=questions, **FAST)


def test_a_missing_record_of_a_known_answer_is_made_again(questions: Path, tmp_path: Path) -> None:
    """Only the packed setting's record is lost: the reference's answer is fed, not generated again."""
    output = tmp_path / "records.jsonl"
    arguments = {"data": questions, "settings": [ExportOptions()], "samples": 1, "output": output, **FAST}
    whole = evaluate("tiny-llava", **arguments)
    lines = output.read_text(encoding="utf-8").splitlines(keepends=True)
    output.write_text("".join(lines[:2]), encoding="utf-8")
    assert without_times(evaluate("tiny-llava", **arguments).to_json()) == without_times(whole.to_json())
    assert output.read_text(encoding="utf-8").splitlines(keepends=True)[:2] == lines[:2]


def test_a_bundle_gives_the_tokens_of_torch(
    questions: Path, document: dict[str, Any], bundle_factory: Callable[..., Path], tmp_path: Path
) -> None:
    bundle = bundle_factory(bits=1, dtype="float32")
    output = tmp_path / "records.jsonl"
    arguments = {"data": questions, "device": "cpu", "max_new_tokens": 12, "batch": 2}
    found = evaluate(bundle, output=output, **arguments).to_json()
    assert (found["kind"], found["dtype"], found["histograms"]) == ("onnxruntime", "float32", [])
    assert [setting["name"] for setting in found["settings"]] == [s["name"] for s in document["settings"]]
    for ours, theirs in zip(found["settings"], document["settings"], strict=True):
        assert ours["metrics"] == theirs["metrics"]
        assert ours["attention_error"] is None
        for name in ("options", "token_agreement", "equal_answers", "bits_per_element", "visual_bytes"):
            assert ours[name] == theirs[name], name
    # Two sides agree on e . H e to 1 % (docs/format.md), and KL is of the second order in e.
    assert found["settings"][1]["kl"] == pytest.approx(document["settings"][1]["kl"], rel=1e-2)

    alone = evaluate(bundle, reference=False, **arguments).to_json()
    (packed,) = alone["settings"]
    means = {name: metric["mean"] for name, metric in found["settings"][1]["metrics"].items()}
    assert {name: metric["mean"] for name, metric in packed["metrics"].items()} == means
    assert all(packed[name] is None for name in ("kl", "token_agreement", "equal_answers", "attention_error"))
    assert all(metric["difference"] is None for metric in packed["metrics"].values())


def test_prompts_of_a_bundle_are_cut_as_a_session_cuts_them(
    questions: Path, bundle_factory: Callable[..., Path]
) -> None:
    bundle = bundle_factory(bits=1, dtype="float32")
    (sample,) = open_task(None, questions, 1, None).samples([0])
    first = []
    for cut in (False, True):
        with Session.load(
            bundle, provider="cpu", threads=1, reuse=False, cut_after_pictures=cut, verify=False
        ) as session:
            prompt = prompt_of(sample, session.processor)
            options: dict[str, Any] = {"max_new_tokens": 6, "ignore_eos": True, "logprobs": True}
            # The model is sure of its answer; of tokens that are unlikely both ways say different things.
            alone = session.generate(prompt, list(sample.pictures), temperature=4.0, seed=1, **options)
            prepared = prepare(sample, session.processor, session.manifest.model.max_positions, 6)
            (logits,) = _follow(session, [prepared], [list(alone.token_ids)])
        found = logits - np.log(np.exp(logits).sum(1, keepdims=True))
        # The same calls; what is left is the rounding of two ways to the softmax.
        np.testing.assert_allclose(found[np.arange(6), alone.token_ids], alone.logprobs, atol=1e-5)
        first.append(found[0][np.isfinite(found[0])])
    assert np.abs(first[0] - first[1]).max() > 1e-2  # the question saw the picture by its codes
    result = evaluate(bundle, data=questions, samples=1, reference=False, max_new_tokens=2, cut_after_pictures=True)
    assert result.to_json()["settings"][0]["name"].endswith(", cut after pictures")
    with pytest.raises(OptionError, match="at 16 bits they are reused without"):
        evaluate(bundle_factory(bits=16, dtype="float32"), samples=1, cut_after_pictures=True)


def test_a_bundle_of_sixteen_bits_has_a_name_of_its_own(questions: Path, bundle_factory: Callable[..., Path]) -> None:
    bundle = bundle_factory(bits=16, dtype="float32")
    result = evaluate(bundle, data=questions, samples=1, device="cpu", max_new_tokens=4)
    assert "±" not in "".join(table(result))  # one sample says nothing of others
    reference, own = result.to_json()["settings"]
    assert (reference["name"], own["name"]) == ("16 bits", "16 bits, onnxruntime")
    assert (reference["reference"], own["reference"]) == (True, False)
    assert (own["token_agreement"], own["equal_answers"]) == (1, 1)
    assert own["kl"] < 1e-6


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"model": "tiny-llava"}, "--model has no effect on a checkpoint"),
        ({"reference": False}, "--no-reference has no effect on a checkpoint"),
        ({"cut_after_pictures": True}, "--cut-after-pictures has no effect on a checkpoint"),
        ({"batch": 0}, "--batch 0"),
        ({"max_new_tokens": 0}, "--max-new-tokens 0"),
        ({"device": "tpu"}, "unknown device 'tpu'"),
        ({"dtype": "int8"}, "dtype 'int8'"),
        ({"force": True}, "force= \\(--force\\) has no effect without output"),
        ({"settings": [ExportOptions(bits_per_layer="9:8")]}, "names layer 9; the model has layers 0 to 3"),
    ],
)
def test_refused_for_a_checkpoint(arguments: dict[str, Any], words: str) -> None:
    with pytest.raises(OptionError, match=words):
        evaluate("tiny-llava", samples=1, **arguments)


def test_refused_for_a_bundle(bundle_factory: Callable[..., Path]) -> None:
    bundle = bundle_factory(bits=1, dtype="float32")
    for arguments, words in (
        ({"settings": [ExportOptions()]}, "a bundle has one setting"),
        ({"dtype": "float32"}, "\\(--dtype\\) has no effect on a bundle"),
        ({"model": "tiny-llava", "reference": False}, r"\(--model\) has no effect with --no-reference"),
    ):
        with pytest.raises(OptionError, match=words):
            evaluate(bundle, samples=1, **arguments)
    with pytest.raises(ModelError, match="unknown model 'nosuchmodel'"):
        evaluate(bundle, samples=1, model="nosuchmodel")
    with pytest.raises(OptionError, match="--sensitivity needs a checkpoint"):
        measure_sensitivity(bundle)


def test_sensitivity(questions: Path, tmp_path: Path) -> None:
    output = tmp_path / "records.jsonl"
    arguments = {**FAST, "batch": 2, "data": questions, "samples": 1, "output": output}
    found = measure_sensitivity("tiny-llava", budget=8.0, **arguments)
    assert [(step.layer, step.bits) for step in found.steps] == [(i, bits) for i in range(4) for bits in (2, 4)]
    assert found.bits_per_layer is not None
    chosen = parse_bits_per_layer(found.bits_per_layer, 4)
    assert set(chosen.values()) <= {2, 4}
    quantization = ExportOptions(bits=found.bits, bits_per_layer=found.bits_per_layer).resolve(4, (576,))
    overhead = 5 * 16 / 2 / 576  # five params a channel and group, for keys and values
    bits = sum(quantization.key_bits) / 4 * 640 / 576
    assert found.chosen_bits_per_element == pytest.approx(bits + overhead)
    assert all(step.gain == pytest.approx(found.kl - step.kl) for step in found.steps)
    assert json.loads(json.dumps(found.to_json()))["format"] == "vkvx-sensitivity"
    # The records are there: another budget asks for no more than a choice.
    tight = measure_sensitivity("tiny-llava", budget=1.2, **arguments)
    assert (tight.steps, tight.bits_per_layer) == (found.steps, None)
    assert tight.chosen_bits_per_element == pytest.approx(1 * 640 / 576 + overhead)


@pytest.mark.parametrize(
    ("base", "budget", "words"),
    [
        (ExportOptions(bits=8), None, "cannot raise 8 bits"),
        (ExportOptions(bits=16), None, "cannot raise 16 bits"),
        (ExportOptions(key_bits=2), None, "one number of bits for all layers"),
        (ExportOptions(bits_per_layer="0:2"), None, "one number of bits for all layers"),
        (ExportOptions(), 1.0, "\\(--budget\\) 1.0 is not above the 1.18 bits"),
        (ExportOptions(), float("nan"), "\\(--budget\\) nan"),
    ],
)
def test_sensitivity_that_is_refused(base: ExportOptions, budget: float | None, words: str) -> None:
    with pytest.raises(OptionError, match=words):
        measure_sensitivity("tiny-llava", base=base, budget=budget, samples=1)


def test_choice_by_hand() -> None:
    """Layer 1 first (5 a bit), then the second step of it (2 a bit) before layer 0 (1 a bit); layer 2 gains nothing."""
    steps = [
        *(Step(0, 2, 0, 1.0, 1.0), Step(0, 4, 0, 1.2, 3.0)),
        *(Step(1, 2, 0, 5.0, 1.0), Step(1, 4, 0, 9.0, 3.0)),
        *(Step(2, 2, 0, -1.0, 1.0), Step(2, 4, 0, 0.0, 3.0)),
    ]
    assert choose(steps, 1, 0.5) == {}
    assert choose(steps, 1, 1.0) == {1: 2}
    assert choose(steps, 1, 2.0) == {1: 2, 0: 2}  # the second step of layer 1 does not fit
    assert choose(steps, 1, 3.0) == {1: 4}
    assert choose(steps, 1, 4.0) == {1: 4, 0: 2}
    assert choose(steps, 1, 100.0) == {1: 4, 0: 4}
    # A step that pays only as a whole is taken as a whole.
    late = [replace(steps[0], gain=0.0), replace(steps[1], gain=3.0)]
    assert choose(late, 1, 3.0) == {0: 4}


@pytest.mark.parametrize(
    ("chosen", "text"),
    [({}, None), ({2: 4}, "2:4"), ({3: 2, 1: 2, 2: 2, 0: 4}, "0:4,1-3:2"), ({0: 2, 2: 2}, "0:2,2:2")],
)
def test_bits_per_layer_as_text(chosen: dict[int, int], text: str | None) -> None:
    assert write_bits_per_layer(chosen) == text
    if text is not None:
        assert parse_bits_per_layer(text, 4) == chosen
