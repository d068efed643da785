"""Recorded moments: those of transformers' own queries, the same to the bit in two goes, and files that are refused."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from reference import Reference, joined, picture
from safetensors.torch import load_file, save_file

from vkvx import ExportOptions, InputError, NumericError, OptionError, export_model, quantize_visual_cache
from vkvx.evaluation import calibration
from vkvx.evaluation.calibration import calibrate
from vkvx.evaluation.run import make_plan
from vkvx.evaluation.settings import settle
from vkvx.evaluation.tasks import prompt_of, questions
from vkvx.export.build import METRICS_FILE
from vkvx.manifest import FILE_NAME, CalibrationInfo, Manifest
from vkvx.models.graph import moments as recorded
from vkvx.models.graph.metric import (
    FAR,
    FLOOR,
    NEAR,
    NEAR_SHARE,
    PRIOR_SAMPLES,
    layer_rotary,
    model_metrics,
    rotation,
)
from vkvx.models.graph.moments import Moments, read_checked, read_moments
from vkvx.models.presets import preset_config
from vkvx.models.random_checkpoint import write_checkpoint
from vkvx.models.registry import resolve
from vkvx.runtime.backends.torch.loading import load_model, load_reference
from vkvx.runtime.sessions.processor import PLACEHOLDER, Processor
from vkvx.storage import write_file

CPU = {"device": "cpu", "dtype": "float32"}


def write_data(directory: Path, count: int, **more: Any) -> Path:
    """Questions about one picture each, of other sizes."""
    lines = []
    for i in range(count):
        picture(90 + 20 * i, 80, i).save(directory / f"{i}.png")
        lines.append({"image": f"{i}.png", "prompt": f"What is number {i}?", **more})
    path = directory / "data.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_data(tmp_path_factory.mktemp("data"), 5)


@pytest.fixture(scope="module")
def file(checkpoint: Path, data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Five answers of the random LLaVA; not to be changed."""
    path = tmp_path_factory.mktemp("metrics") / "metrics.safetensors"
    calibrate(checkpoint, path, data=data, max_new_tokens=6, **CPU)
    return path


@pytest.mark.parametrize("preset", ["tiny-qwen3-vl", "tiny-glm-4.1v", "tiny-gemma3"])
def test_moments_are_those_of_transformers_own_queries(preset: str, tmp_path: Path) -> None:
    """Norms of queries, rotary embeddings in three axes, of neighbours and of a part of a head, windows, grouped heads.

    Both compute in FP32, transformers its queries before the rotary embedding, where nothing has to be taken back.
    Sums of squares of numbers that some ten layers of FP32 products have gone through agree to some 1e-5; a position,
    head or token that is not the right one is off by parts of the whole.
    """
    directory, output = tmp_path / "model", tmp_path / "metrics.safetensors"
    write_checkpoint(directory, preset_config(preset), dtype="float32", seed=1)
    path = write_data(tmp_path, 4, answers=["these words are the answer"])
    done = calibrate(directory, output, data=path, **CPU)
    assert (done.samples, done.recorded) == (4, 4)

    source, reference = resolve(directory), Reference(directory)
    info = source.info("float32")
    processor = Processor.of_checkpoint(source, info)
    queries: dict[int, torch.Tensor] = {}
    for i, block in enumerate(source.family.text_model(reference.model).layers):
        norm = getattr(block.self_attn, "q_norm", None)
        module = block.self_attn.q_proj if norm is None else norm
        module.register_forward_hook(lambda module, args, output, i=i: queries.__setitem__(i, output[0]))
    query = dict.fromkeys(info.caches, 0.0)
    attention = dict.fromkeys(info.caches, 0.0)
    tokens = 0
    for sample in questions(path, None, ()).samples(range(4)):
        prompt = prompt_of(sample, processor)
        answer = np.array([*processor.encode(sample.answers[0]), *info.eos_token_ids[:1]])[:-1]
        first = reference.inputs([prompt.replace(PLACEHOLDER, reference.picture)], [[load(sample.pictures[0])]])
        whole = joined(first, answer, {n: x[:, :0] for n, x in first.items() if x.shape == first["input_ids"].shape})
        with torch.no_grad():
            found = reference.model(**whole, output_attentions=True)
        visual = whole["input_ids"][0] == info.image_token_id
        tokens += len(answer)
        for i in info.caches:
            layer = info.layers[i]
            raw = queries[i].reshape(-1, info.query_heads, layer.head_dim) if queries[i].dim() == 2 else queries[i]
            raw = raw if raw.shape[0] == info.query_heads else raw.transpose(0, 1)
            raw = raw[:, -len(answer) :].double()
            share = found.attentions[i][0, :, -len(answer) :, visual].double().square().sum(-1)
            grouped = raw.unflatten(0, (layer.kv_heads, -1)).flatten(1, 2)
            query[i] = query[i] + grouped.transpose(1, 2) @ grouped
            attention[i] = attention[i] + share.sum(1)
    assert done.tokens == tokens
    stored = load_file(output)
    for i in info.caches:
        for name, wanted in ((f"query.{i}", query[i]), (f"attention.{i}", attention[i])):
            assert (stored.pop(name) - wanted).abs().max() <= 1e-3 * wanted.abs().max()
    assert not stored


def load(path: Any) -> Any:
    from PIL import Image

    return Image.open(path).convert("RGB")


def test_a_run_goes_on_where_it_ended(checkpoint: Path, data: Path, file: Path, tmp_path: Path) -> None:
    output = tmp_path / "metrics.safetensors"

    def interrupt(stage: str, done: int, total: int) -> None:
        if (stage, done) == ("calibrate", 2):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        calibrate(checkpoint, output, data=data, max_new_tokens=6, progress=interrupt, **CPU)
    assert [path.name for path in tmp_path.iterdir()] == [output.name]
    two = load_file(output)
    done = calibrate(checkpoint, output, data=data, max_new_tokens=6, samples=4, **CPU)
    assert (done.samples, done.recorded) == (4, 2)
    done = calibrate(checkpoint, output, data=data, max_new_tokens=6, **CPU)
    assert (done.samples, done.recorded, done.data) == (5, 1, "data.jsonl")
    one_go, parts = load_file(file), load_file(output)
    assert all(torch.equal(parts[name], tensor) for name, tensor in one_go.items())
    assert not torch.equal(two["query.0"], parts["query.0"])
    assert calibrate(checkpoint, output, data=data, max_new_tokens=6, **CPU).recorded == 0
    for given, words in (
        ({"samples": 4}, "holds 5 answers; give samples= \\(--samples\\) 5 or more"),
        ({"max_new_tokens": 5}, "its longest answer is another"),
    ):
        with pytest.raises(OptionError, match=words):
            calibrate(checkpoint, output, data=data, **{"max_new_tokens": 6, **CPU, **given})
    done = calibrate(checkpoint, output, data=data, max_new_tokens=5, samples=4, force=True, **CPU)
    assert (done.samples, done.recorded) == (4, 4)


def test_two_runs_into_one_file_do_not_mix(checkpoint: Path, data: Path, file: Path, tmp_path: Path) -> None:
    output = tmp_path / "metrics.safetensors"

    def another_run(stage: str, done: int, total: int) -> None:
        if (stage, done) == ("calibrate", 1):
            write_file(output, file.read_bytes())

    with pytest.raises(OptionError, match="meanwhile; wait for its end, or choose another output="):
        calibrate(checkpoint, output, data=data, max_new_tokens=6, progress=another_run, **CPU)
    assert output.read_bytes() == file.read_bytes()


def test_metrics_are_what_the_format_says(checkpoint: Path, file: Path) -> None:
    source = resolve(checkpoint)
    model, info = load_model(source, torch.float32), source.info("float32")
    moments = read_moments(file, info, source.config)
    metrics = model_metrics(source.family, model, info, moments)
    share = PRIOR_SAMPLES / (PRIOR_SAMPLES + 5)
    heads, groups = info.layers[0].kv_heads, info.query_heads // info.layers[0].kv_heads
    d = info.layers[0].head_dim
    stored = {name: tensor.double().numpy() for name, tensor in load_file(file).items()}
    for i in info.caches:
        block = source.family.text_model(model).layers[i]
        weight = (block.self_attn.q_proj.weight * block.input_layernorm.weight).double().numpy()
        output = block.self_attn.o_proj.weight.double().numpy()
        rotary = layer_rotary(source.family, model)[i]
        near = np.unique(np.geomspace(1, NEAR, 64).astype(np.int64))
        far = np.unique((np.linspace(1, FAR**0.5, 64) ** 2).astype(np.int64))
        turns = [
            (share / len(window), turn)
            for share, window in ((NEAR_SHARE, near), (1 - NEAR_SHARE, far))
            for turn in rotation(rotary, torch.from_numpy(window)).double().numpy()
        ]
        for head in range(heads):
            white, value = np.zeros((d, d)), np.zeros((d, d))
            taken = stored[f"attention.{i}"][head * groups : (head + 1) * groups]
            for h in range(groups):
                rows = slice((head * groups + h) * d, (head * groups + h + 1) * d)
                white += weight[rows] @ weight[rows].T
                counts = share + (1 - share) * taken[h] / taken.mean()
                value += counts * output[:, rows].T @ output[:, rows]
            own = stored[f"query.{i}"][head]
            mixed = share * white / np.trace(white) + (1 - share) * own / np.trace(own)
            key = np.zeros((d, d))
            for factor, (cosine, sine) in turns:
                turn = np.diag(cosine)
                half = d // 2
                turn[np.arange(half), np.arange(half) + half] = -sine[:half]
                turn[np.arange(half) + half, np.arange(half)] = sine[:half]
                key += factor * turn @ mixed @ turn.T
            for wanted, found in ((key, metrics.key), (value, metrics.value)):
                wanted = wanted / (np.trace(wanted) / d) + FLOOR * np.eye(d)
                assert np.allclose(found[i][head].numpy(), wanted, rtol=2e-3, atol=2e-4)  # FP16 has 2^-11


def test_bundle_plug_in_and_reference_use_them(
    checkpoint: Path, file: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    source = resolve(checkpoint)
    info = source.info("float32")
    export_model(checkpoint, tmp_path / "b", ExportOptions(dtype="float32", metrics_file=file))
    assert "holds 5 answers, fewer than the 16 that show more" in caplog.text
    manifest = Manifest.load(tmp_path / "b")
    moments = read_moments(file, info, source.config)
    assert manifest.calibration == CalibrationInfo("data.jsonl", 5, moments.tokens)
    assert manifest.format_version == 3
    model = load_model(source, torch.float32)
    plain, metrics = model_metrics(source.family, model, info), model_metrics(source.family, model, info, moments)
    stored = load_file(tmp_path / "b" / METRICS_FILE)
    with pytest.warns(UserWarning, match="holds 5 answers"):
        handle = quantize_visual_cache(model, metrics_file=file)
    with handle:
        assert handle.metrics is not None
        for i in info.caches:
            assert torch.equal(stored[f"key.{i}"], metrics.key[i])
            assert torch.equal(stored[f"value.{i}"], metrics.value[i])
            assert torch.equal(handle.metrics.key[i], metrics.key[i])
            assert not torch.equal(plain.key[i], metrics.key[i])
    reference = load_reference(source, manifest, bundle=tmp_path / "b")
    assert torch.equal(reference._decoder.key_metrics[0], metrics.key[0])
    both = [ExportOptions(), ExportOptions(metrics_file=file)]
    names = [setting.name for setting in settle(both, info.cached_layers, info.typical_tokens)]
    assert names == ["16 bits", "1 bit, shaped, expected", f"1 bit, shaped, expected, metrics file {file}"]


def damaged(change: Callable[[dict[str, torch.Tensor], dict[str, Any]], None]) -> Callable[[Path, Path], None]:
    def write(source: Path, target: Path) -> None:
        from safetensors import safe_open

        with safe_open(source, "pt") as found:
            said = found.metadata()
        tensors, about = load_file(source), json.loads(said["about"])
        change(tensors, about)
        save_file(tensors, target, {**said, "about": json.dumps(about)})

    return write


@pytest.mark.parametrize(
    ("write", "words"),
    [
        (lambda source, target: target.write_bytes(source.read_bytes()[:-9]), "is damaged"),
        (lambda source, target: target.write_text("no"), "is damaged"),
        (lambda source, target: save_file({"x": torch.ones(1)}, target), "holds no recorded moments"),
        (lambda source, target: None, "no file at"),
        (damaged(lambda t, a: t["query.1"][0].fill_(torch.inf)), "holds numbers in query.1 that are no moments"),
        (damaged(lambda t, a: t["query.1"][0].neg_()), "holds numbers in query.1 that are no moments"),
        (damaged(lambda t, a: t["attention.0"].fill_(-1)), "holds numbers in attention.0 that are no moments"),
        (damaged(lambda t, a: t.update({"attention.0": t["attention.0"].half()})), "that are no moments"),
        (damaged(lambda t, a: t.pop("query.1")), "is of another model"),
        (damaged(lambda t, a: (t.pop("query.1"), t.pop("attention.1"))), "it has 1 layers, the model 2"),
        (damaged(lambda t, a: t.update({"query.0": torch.ones(1, 32, 32)})), "its query.0 is \\[1, 32, 32\\], the mod"),
        (damaged(lambda t, a: a.update(model="0")), "is of another model: its configuration differs"),
        (damaged(lambda t, a: a.pop("samples")), "is damaged"),
        (damaged(lambda t, a: a.update(samples=float("inf"))), "is damaged"),
        (damaged(lambda t, a: a.update(tokens=0)), "holds no queries"),
        (damaged(lambda t, a: a.update(samples=3)), "holds 3 answers, at least 4 are needed"),
    ],
)
def test_files_that_are_refused(
    checkpoint: Path, file: Path, tmp_path: Path, write: Callable[[Path, Path], None], words: str
) -> None:
    path, source = tmp_path / "metrics.safetensors", resolve(checkpoint)
    write(file, path)
    with pytest.raises(OptionError, match=words):
        read_checked(path, source.info("float32"), source.config, warnings.warn)


def test_nothing_is_left_of_runs_that_refuse_a_file(checkpoint: Path, data: Path, tmp_path: Path) -> None:
    options = ExportOptions(metrics_file=tmp_path / "none")
    with pytest.raises(OptionError, match="no file at"):
        export_model(checkpoint, tmp_path / "b", options)
    with pytest.raises(OptionError, match="no file at"):
        make_plan(checkpoint, questions(data, None, (), answered=False), [options], device="cpu")
    for given in ({"quantizer": "lloyd"}, {"bits": 16}):
        with pytest.raises(OptionError, match="metrics_file= \\(--metrics-file\\) has no effect"):
            export_model(checkpoint, tmp_path / "b", ExportOptions(metrics_file=tmp_path / "none", **given))
    assert not list(tmp_path.iterdir())


def test_what_cannot_be_calibrated(
    checkpoint: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "bundle").mkdir()
    (tmp_path / "bundle" / FILE_NAME).touch()
    output = tmp_path / "metrics.safetensors"
    (tmp_path / "bad.jsonl").write_text('{"image": "none.png", "prompt": "What?"}\n' * 4, encoding="utf-8")
    for target, given, error, words in (
        (checkpoint, {}, OptionError, "no pictures to calibrate"),
        (checkpoint, {"data": data, "samples": 3}, OptionError, "3 samples are too few"),
        (checkpoint, {"data": data, "samples": 0}, OptionError, "--samples 0 is not supported"),
        (checkpoint, {"data": data, "max_new_tokens": 1}, OptionError, "--max-new-tokens 1 is not supported"),
        (checkpoint, {"data": tmp_path / "bad.jsonl"}, InputError, "bad.jsonl:1: no picture at"),
        (tmp_path / "bundle", {"data": data}, OptionError, "is a bundle"),
    ):
        with pytest.raises(error, match=words):
            calibrate(target, output, **{**CPU, **given})
    monkeypatch.setattr(recorded, "second_moments", lambda query, heads: torch.full((heads, 1, 1), torch.nan))
    with pytest.raises(NumericError, match=r"data.jsonl:1: queries of layer 0 are infinite or no numbers"):
        calibrate(checkpoint, output, data=data, max_new_tokens=3, **CPU)
    assert not output.exists()
    (tmp_path / "other").write_text("mine")
    with pytest.raises(OptionError, match=r"is damaged .* start anew with force="):
        calibrate(checkpoint, tmp_path / "other", data=data, **CPU)
    assert (tmp_path / "other").read_text() == "mine"


def test_nothing_recorded_leaves_the_prior() -> None:
    prior = torch.tensor([[[2.0, 1.0], [1.0, 2.0]]])
    assert torch.equal(recorded.mixed(prior, torch.zeros(1, 2, 2), 0.1), prior / 4)
    assert torch.equal(recorded.head_weights(torch.zeros(4), 0.1, 2), torch.ones(4))
    assert calibration.SAMPLES >= recorded.ENOUGH_SAMPLES >= recorded.LEAST_SAMPLES
    assert isinstance(Moments("", [], []).run, dict)
