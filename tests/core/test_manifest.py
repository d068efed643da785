"""The manifest reads back what it wrote, counts bytes rightly, and refuses what is newer, damaged or unsafe."""

from __future__ import annotations

import copy
import itertools
import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from vkvx import typed_json
from vkvx.cache_layout import CacheLayout
from vkvx.errors import BundleError
from vkvx.graph_specs import decoder_inputs, decoder_outputs
from vkvx.manifest import (
    FILE_NAME,
    FORMAT_VERSION,
    CalibrationInfo,
    LayerInfo,
    Manifest,
    ModelInfo,
    Quantization,
    sha256,
)

CONTENTS = {"vision.onnx": b"vision", "decoder.onnx": b"decoder", "processor/tokenizer.json": b"{}"}

LAYER = {
    "kv_heads": 2,
    "head_dim": 64,
    "scale": 0.125,
    "sliding_window": 0,
    "visual_mask": "causal",
    "softcap": 0.0,
    "rotary_dim": 0,
    "rotary_interleaved": False,
    "keys_of": None,
    "linear": None,
}
LINEAR = {"conv_channels": 40, "conv_width": 3, "heads": 2, "key_dim": 8, "value_dim": 12}


def example(bits: int = 1, layers: int = 2) -> dict[str, Any]:
    """A manifest of LLaVA; ``graphs`` are those of its model."""
    data = {
        "format": "vkvx-bundle",
        "format_version": FORMAT_VERSION,
        "vkvx_version": "0.1.0",
        "operator_version": 1,
        "model": {
            "name": "tiny",
            "source": "somewhere",
            "revision": None,
            "architecture": "LlavaForConditionalGeneration",
            "dtype": "float16",
            "layers": [copy.deepcopy(LAYER) for _ in range(layers)],
            "query_heads": 4,
            "hidden_size": 256,
            "embed_width": 256,
            "vocab_size": 128,
            "max_positions": 4096,
            "position_rows": 1,
            "image_token_id": 3,
            "tokens_per_picture": 576,
            "typical_tokens": [576],
            "pictures": {"kind": "tiles", "numbers": {"tile_tokens": 576}, "marks": {}},
            "prompt": {"picture": "", "begin": "", "end": ""},
            "eos_token_ids": [2],
            "pad_token_id": 0,
        },
        "quantization": {
            "key_bits": [bits] * layers,
            "value_bits": [bits] * layers,
            "group_size": 640,
            "quantizer": "lloyd",
            "quantile_alpha_key": [0.2] * layers,
            "quantile_alpha_value": [0.2] * layers,
            "shrink_key": [0.5] * layers,
            "shrink_value": [0.3] * layers,
            "score_correction": "expected",
            "tau": 3,
            "correction_limit": 3.0,
            "text_bits": 16,
        },
        "graphs": {},
        "processor": "processor",
        "files": {name: {"bytes": len(data), "sha256": "0" * 64} for name, data in CONTENTS.items()},
        "tools": {"python": "3.11"},
    }
    return describe(data)


def describe(data: dict[str, Any]) -> dict[str, Any]:
    """Give a manifest the graphs that suit its model and quantisation."""
    model = typed_json.read(ModelInfo, data["model"], ValueError)
    quantization = typed_json.read(Quantization, data["quantization"], ValueError)
    pixels = {"name": "pixel_values", "dtype": "float32", "shape": ["P", 3, 336, 336]}
    embeds = {"name": "image_embeds", "dtype": model.dtype, "shape": ["576*P", model.embed_width]}
    layout = CacheLayout(model, quantization)
    sides = ("inputs", decoder_inputs(layout)), ("outputs", decoder_outputs(layout))
    decoder = {side: json.loads(json.dumps([asdict(spec) for spec in specs])) for side, specs in sides}
    data["graphs"] = {
        "vision": {"file": "vision.onnx", "opset": 18, "inputs": [pixels], "outputs": [embeds]},
        "decoder": {"file": "decoder.onnx", "opset": 18, **decoder},
    }
    return data


def write(directory: Path, data: dict[str, Any] | None = None) -> Path:
    data = data or example()
    for name, content in CONTENTS.items():
        path = directory / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
        data["files"][name] = {"bytes": len(content), "sha256": sha256(path)}
    (directory / FILE_NAME).write_text(json.dumps(data))
    return directory


def test_round_trip(tmp_path: Path) -> None:
    manifest = Manifest.load(write(tmp_path))
    manifest.save(tmp_path)
    assert Manifest.load(tmp_path) == manifest
    assert json.loads((tmp_path / FILE_NAME).read_text())["format_version"] == 3


def test_text_of_8_bits_is_version_four() -> None:
    data = example()
    data["quantization"]["text_bits"] = 8
    found = Manifest.from_json(describe(data))
    assert found.to_json()["format_version"] == FORMAT_VERSION == 4
    assert found.layout.tensors(1, 640, 9)["1.text_value"] == ("int32", (1, 2, 9, 17))
    assert found.layout.text_bytes_per_token == 2 * 2 * 2 * (64 + 4)  # layers, keys and values, heads


def test_version_three_knew_text_of_16_bits() -> None:
    """Whatever stands under the key, which its readers do not know."""
    data = example() | {"format_version": 3}
    data["quantization"]["text_bits"] = 8
    assert Manifest.from_json(data).quantization.text_bits == 16
    del data["quantization"]["text_bits"]
    assert Manifest.from_json(data) == Manifest.from_json(example())


def test_unknown_keys_are_ignored() -> None:
    data = example()
    data["model"]["colour"] = "blue"
    assert Manifest.from_json(data) == Manifest.from_json(example())


def test_verify_names_the_file_that_differs(tmp_path: Path) -> None:
    manifest = Manifest.load(write(tmp_path))
    calls: list[tuple[str, int, int]] = []
    manifest.verify(tmp_path, lambda *call: calls.append(call))
    total = sum(map(len, CONTENTS.values()))
    assert calls[-1] == ("verify", total, total)
    (tmp_path / "decoder.onnx").write_bytes(b"DECODER")
    with pytest.raises(BundleError, match=r"decoder\.onnx"):
        Manifest.load(tmp_path).verify(tmp_path)


RULES = {
    "temperature": 0.7,
    "top_k": 20,
    "top_p": 0.8,
    "repetition_penalty": 1.05,
    "no_repeat_ngram_size": 3,
    "min_new_tokens": 2,
    "suppress_tokens": [7],
    "begin_suppress_tokens": [2],
    "bad_words_ids": [[5], [6, 7]],
    "stop": ["###"],
    "ignored": ["num_beams"],
}


def test_rules_of_answers_are_optional() -> None:
    """Bundles of older exporters have none; the likeliest token is theirs."""
    plain = Manifest.from_json(example()).generation
    assert plain.rules() == {}
    found = Manifest.from_json({**example(), "generation": RULES})
    assert (found.generation.temperature, found.generation.bad_words_ids) == (0.7, ((5,), (6, 7)))
    assert found.generation.rules().keys() == RULES.keys() - {"ignored"}
    assert Manifest.from_json(json.loads(json.dumps(found.to_json()))) == found


def test_calibration_is_optional() -> None:
    """Bundles of older exporters say nothing of it: their metrics came from the weights."""
    found = Manifest.from_json({**example(), "calibration": {"data": "a.jsonl", "samples": 16, "tokens": 480}})
    assert found.calibration == CalibrationInfo("a.jsonl", 16, 480)
    assert Manifest.from_json(json.loads(json.dumps(found.to_json()))) == found
    assert found.format_version == Manifest.from_json(example()).format_version
    assert Manifest.from_json({**example(), "calibration": None}) == Manifest.from_json(example())
    with pytest.raises(BundleError, match=r"calibration\.samples must be"):
        Manifest.from_json({**example(), "calibration": {"data": "a.jsonl", "samples": 0, "tokens": 480}})


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("temperature", -1.0, "0 \\(greedy\\) or a positive number"),
        ("top_p", 0.0, "above 0 and at most 1"),
        ("suppress_tokens", [-2], "token ids"),
        ("bad_words_ids", [[]], "lists of token ids"),
        ("stop", [""], "strings that are not empty"),
        ("top_k", "many", "an integer"),
    ],
)
def test_rules_of_answers_that_cannot_be(name: str, value: object, words: str) -> None:
    with pytest.raises(BundleError, match=rf"generation\.{name} must be {words}"):
        Manifest.from_json({**example(), "generation": {**RULES, name: value}})


def test_missing_and_resized_files(tmp_path: Path) -> None:
    write(tmp_path)
    (tmp_path / "vision.onnx").write_bytes(b"longer than it was")
    with pytest.raises(BundleError, match=r"vision.onnx has 18 bytes, expected 6"):
        Manifest.load(tmp_path)
    (tmp_path / "vision.onnx").unlink()
    with pytest.raises(BundleError, match=r"vision.onnx is missing"):
        Manifest.load(tmp_path)


def test_no_bundle_and_no_json(tmp_path: Path) -> None:
    with pytest.raises(BundleError, match="is no directory; make a vkvx bundle with"):
        Manifest.load(tmp_path / "absent")
    with pytest.raises(BundleError, match="is no vkvx bundle: it holds no"):
        Manifest.load(tmp_path)
    (tmp_path / FILE_NAME).write_bytes(b"\xff{")
    with pytest.raises(BundleError, match="not valid JSON"):
        Manifest.load(tmp_path)


def test_newer_format_asks_for_an_upgrade() -> None:
    with pytest.raises(BundleError, match="install a newer vkvx, or export the model again"):
        Manifest.from_json({"format": "vkvx-bundle", "format_version": FORMAT_VERSION + 1})


@pytest.mark.parametrize(
    "name",
    [
        "/etc/passwd",
        "../other",
        "a/../../b",
        "a//b",
        "./a",
        "",
        ".",
        "c:/x",
        "c:x",
        "a\\b",
        "//host/share",
        "x\0y",
        "x\ny",
        "\ud800",
        "x" * 1025,
    ],
)
def test_paths_that_leave_the_bundle(name: str) -> None:
    for place in (("files",), ("processor",), ("graphs", "vision", "file")):
        data = example()
        if place == ("files",):
            data["files"][name] = {"bytes": 1, "sha256": "0" * 64}
        elif place == ("processor",):
            data["processor"] = name
        else:
            data["graphs"]["vision"]["file"] = name
        with pytest.raises(BundleError):
            Manifest.from_json(data)


def test_links_out_of_the_bundle(tmp_path: Path) -> None:
    bundle = write(tmp_path / "bundle")
    outside = tmp_path / "outside"
    outside.write_bytes(CONTENTS["vision.onnx"])
    (bundle / "vision.onnx").unlink()
    (bundle / "vision.onnx").symlink_to(outside)
    with pytest.raises(BundleError, match="leaves the directory"):
        Manifest.load(bundle)
    (bundle / "vision.onnx").unlink()
    (bundle / "vision.onnx").symlink_to("vision.onnx")
    with pytest.raises(BundleError, match="missing"):
        Manifest.load(bundle)


def test_a_linked_bundle_and_a_relative_one_are_fine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bundle = write(tmp_path / "bundle")
    (tmp_path / "link").symlink_to(bundle)
    assert Manifest.load(tmp_path / "link") == Manifest.load(bundle)
    monkeypatch.chdir(tmp_path)
    assert Manifest.load("bundle") == Manifest.load(os.curdir + "/link")


def set_at(*path: Any) -> Callable[[dict[str, Any], Any], None]:
    def change(data: dict[str, Any], value: Any) -> None:
        for key in path[:-1]:
            data = data[key]
        data[path[-1]] = value

    return change


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (("format",), "other"),
        (("format_version",), "1"),
        (("format_version",), True),
        (("model",), []),
        (("model", "layers"), []),
        (("model", "layers"), [LAYER] * 3),
        (("model", "layers"), 2),
        (("model", "layers", 1, "head_dim"), 40),
        (("model", "layers", 1, "kv_heads"), 3),
        (("model", "layers", 1, "kv_heads"), 0),
        (("model", "layers", 1, "scale"), 0),
        (("model", "layers", 1, "sliding_window"), -1),
        (("model", "layers", 1, "visual_mask"), "magic"),
        (("model", "layers", 1, "softcap"), -1.0),
        (("model", "layers", 1, "rotary_dim"), 65),
        (("model", "layers", 1, "rotary_dim"), 66),
        (("model", "layers", 0, "keys_of"), 1),
        (("model", "layers", 1, "keys_of"), 1),
        (("model", "layers", 1, "keys_of"), 0),  # the quantisation has two caches
        (("model", "dtype"), "int8"),
        (("model", "tokens_per_picture"), 0),
        (("model", "tokens_per_picture"), True),
        (("model", "eos_token_ids"), 2),
        (("quantization", "key_bits"), [16, 1]),
        (("quantization", "key_bits"), [3, 1]),
        (("quantization", "key_bits"), [1]),
        (("quantization", "value_bits"), [16, 16]),
        (("quantization", "group_size"), 100),
        (("quantization", "group_size"), 0),
        (("quantization", "quantizer"), "magic"),
        (("quantization", "score_correction"), "magic"),
        (("quantization", "tau"), float("nan")),
        (("quantization", "tau"), "3"),
        (("quantization", "text_bits"), 4),
        (("quantization", "text_bits"), 8),  # the graphs have text rows of 16 bits
        (("graphs",), {}),
        (("graphs", "vision", "file"), "absent.onnx"),
        (("graphs", "vision", "inputs"), [{"name": "x", "dtype": "float32", "shape": [None]}]),
        (("processor",), "absent"),
        (("files", "vision.onnx"), {"bytes": 1}),
        (("files",), []),
    ],
)
def test_values_that_cannot_be(path: tuple[str, ...], value: Any) -> None:
    data = copy.deepcopy(example())
    set_at(*path)(data, value)
    with pytest.raises(BundleError) as caught:
        Manifest.from_json(data)
    assert "\n" not in str(caught.value)


def test_another_version_of_the_operator() -> None:
    with pytest.raises(
        BundleError, match=r"version 99, this vkvx has 1; install a newer vkvx, or export the model again"
    ):
        Manifest.from_json(example() | {"operator_version": 99})


@pytest.mark.parametrize(
    "path", [("format_version",), ("operator_version",), ("model", "vocab_size"), ("quantization", "tau"), ("graphs",)]
)
@pytest.mark.parametrize("digits", [20, 400, 5000])
def test_numbers_without_end(tmp_path: Path, path: tuple[str, ...], digits: int) -> None:
    data = example()
    set_at(*path)(data, "NUMBER")
    text = json.dumps(data).replace('"NUMBER"', "9" * digits)
    (tmp_path / FILE_NAME).write_text(text)
    with pytest.raises(BundleError) as caught:
        Manifest.load(tmp_path)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 400 + len(str(tmp_path))


@pytest.mark.parametrize(
    "path", [("hidden_size",), ("vocab_size",), ("tokens_per_picture",), ("layers", 0, "kv_heads")]
)
def test_sizes_beyond_those_of_an_index(path: tuple[Any, ...]) -> None:
    data = example()
    set_at("model", *path)(data, 2**31)
    with pytest.raises(BundleError, match=rf"model.*{path[-1]} must be \d to 2147483647"):
        Manifest.from_json(data)


@pytest.mark.parametrize("section", ["model", "quantization"])
def test_each_key_is_needed(section: str) -> None:
    for key in example()[section]:
        data = example()
        del data[section][key]
        with pytest.raises(BundleError, match=f"{section}.{key} is missing"):
            Manifest.from_json(data)


def test_needs_the_standard_library_only() -> None:
    code = "import sys, vkvx.manifest; print(*{'numpy', 'torch', 'onnx', 'transformers'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == ""


def test_each_key_of_a_layer_is_needed() -> None:
    for key in LAYER:
        data = example()
        del data["model"]["layers"][1][key]
        with pytest.raises(BundleError, match=rf"model\.layers\[1\]\.{key} is missing"):
            Manifest.from_json(data)


def test_layers_with_windows_and_shared_keys() -> None:
    data = example(layers=3)
    layers = data["model"]["layers"]
    layers[0]["sliding_window"] = 24
    data["model"]["layers"] += [layers[0] | {"keys_of": 0}, layers[2] | {"keys_of": 2}]
    manifest = Manifest.from_json(describe(data))
    assert (len(manifest.model.layers), manifest.model.cached_layers, manifest.model.sliding_window) == (5, 3, 24)
    assert len(manifest.layout.tensors(1, 640, 1)) == 3 * 6
    for name, value in (("sliding_window", 25), ("scale", 1.0), ("keys_of", 3), ("keys_of", None)):
        broken = copy.deepcopy(data)
        broken["model"]["layers"][4][name] = value
        with pytest.raises(BundleError, match=r"model\.layers\[|quantization.key_bits"):
            Manifest.from_json(broken)


def test_layers_of_linear_attention() -> None:
    data = example(layers=2)
    nothing = LAYER | {"kv_heads": 0, "head_dim": 0, "scale": 0.0, "linear": dict(LINEAR)}
    layers = data["model"]["layers"]
    data["model"]["layers"] = [nothing, layers[0], copy.deepcopy(nothing), layers[1], layers[1] | {"keys_of": 3}]
    manifest = Manifest.from_json(describe(data))
    model, layout = manifest.model, manifest.layout
    assert (model.attention_layers, model.linear_layers, model.caches) == ((1, 3, 4), (0, 2), (1, 3))
    tensors = layout.tensors(5, 640, 7)
    assert list(tensors)[:3] == ["0.conv_state", "0.recurrent_state", "1.visual_key"]
    assert tensors["2.conv_state"] == ("float16", (5, 40, 3))
    assert tensors["2.recurrent_state"] == ("float32", (5, 2, 8, 12))
    assert len(tensors) == 2 * 2 + 2 * 6
    assert layout.state_bytes == 2 * (40 * 3 * 2 + 2 * 8 * 12 * 4)
    assert layout.text_bytes_per_token == Manifest.from_json(example(layers=2)).layout.text_bytes_per_token
    for layer, name, value in ((0, "head_dim", 64), (0, "keys_of", 1), (3, "keys_of", 0), (1, "keys_of", 3)):
        broken = copy.deepcopy(data)
        broken["model"]["layers"][layer][name] = value
        with pytest.raises(BundleError, match=r"model\.layers\[|quantization.key_bits"):
            Manifest.from_json(broken)
    data["model"]["layers"][2]["linear"]["heads"] = 0
    with pytest.raises(BundleError, match=r"model\.layers\[2\]\.linear\.heads must be 1 to"):
        Manifest.from_json(data)
    data["model"]["layers"] = [nothing]
    with pytest.raises(BundleError, match="one of them with a cache"):
        Manifest.from_json(data)


def older(version: int, layers: Any = 2) -> dict[str, Any]:
    """The same manifest in a format version that knew layers of one kind only."""
    data = example()
    model = data["model"]
    data["format_version"] = version
    model |= {"layers": layers, "kv_heads": 2, "head_dim": 64}
    del model["prompt"]
    if version == 2:
        model |= {"rotary_dim": 32, "rotary_interleaved": True, "attention_scale": 0.5}
        return data
    for name in ("typical_tokens", "pictures", "position_rows", "embed_width"):
        del model[name]
    data["graphs"]["vision"] |= {
        "inputs": [{"name": "pixel_values", "dtype": "float32", "shape": ["P", 3, 336, 336]}],
        "outputs": [{"name": "image_embeds", "dtype": "float16", "shape": ["Np", 256]}],
    }
    return data


def test_version_one_knew_pictures_of_one_size() -> None:
    manifest = Manifest.from_json(older(1))
    model = manifest.model
    assert (model.typical_tokens, model.usual_tokens, model.embed_width) == ((576,), 576, 256)
    assert (model.position_rows, model.layers) == (1, (LayerInfo(kv_heads=2, head_dim=64, scale=0.125),) * 2)
    assert (model.pictures.kind, model.pictures.numbers) == ("tiles", {"tile_tokens": 576})
    assert manifest.graphs["vision"].output_rows({"pixel_values": range(3)}) == 3 * 576


def test_version_two_knew_layers_of_one_kind() -> None:
    layer = LayerInfo(kv_heads=2, head_dim=64, scale=0.5, rotary_dim=32, rotary_interleaved=True)
    assert Manifest.from_json(older(2)).model.layers == (layer, layer)
    plain = older(2)
    plain["model"]["attention_scale"] = 0.0
    assert Manifest.from_json(plain).model.layers[0].scale == 0.125
    for version, broken in itertools.product((1, 2), (3, 2**31, 0, -1, "2", None)):
        with pytest.raises(BundleError, match=r"model\.layers|quantization.key_bits"):
            Manifest.from_json(older(version, broken))
