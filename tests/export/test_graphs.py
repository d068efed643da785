"""The ONNX files of a bundle: interface, structure, and that no size was frozen."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from onnx import TensorProto
from torch import Tensor, nn

from vkvx.errors import ModelError
from vkvx.export.build import METRICS_FILE
from vkvx.export.trace import trace
from vkvx.manifest import Graph, Manifest, TensorSpec
from vkvx.models.registry import resolve
from vkvx.plugins.operator import ALL_INPUTS, INPUTS, NAME, OUTPUTS, OperatorAttributes, layer_attributes
from vkvx.plugins.schema import operator_schema
from vkvx.runtime.backends.torch.loading import load_reference
from vkvx.runtime.calls import Row, build_call, place_embeds

TYPES = {
    "float32": TensorProto.FLOAT,
    "float16": TensorProto.FLOAT16,
    "bfloat16": TensorProto.BFLOAT16,
    "int32": TensorProto.INT32,
}
BUNDLES = ("mixed_bundle", "baseline_bundle")


@pytest.fixture(params=BUNDLES)
def bundle(request: pytest.FixtureRequest) -> Path:
    return request.getfixturevalue(request.param)


def load(bundle: Path, graph: str) -> tuple[onnx.ModelProto, Graph]:
    entry = Manifest.load(bundle).graphs[graph]
    return onnx.load(bundle / entry.file, load_external_data=False), entry


@pytest.mark.parametrize("name", ["vision", "decoder"])
def test_interface_is_that_of_the_manifest(bundle: Path, name: str) -> None:
    model, graph = load(bundle, name)
    for values, specs in ((model.graph.input, graph.inputs), (model.graph.output, graph.outputs)):
        assert [value.name for value in values] == [spec.name for spec in specs]
        for value, spec in zip(values, specs, strict=True):
            kind = value.type.tensor_type
            assert kind.elem_type == TYPES[spec.dtype]
            assert kind.elem_type != TensorProto.INT64
            assert tuple(dim.dim_param or dim.dim_value for dim in kind.shape.dim) == spec.shape


def test_every_dimension_that_may_vary_has_a_name(mixed_bundle: Path) -> None:
    _, graph = load(mixed_bundle, "decoder")
    shapes = {spec.name: spec.shape for spec in graph.inputs}
    assert shapes["input_ids"] == shapes["position_ids"] == ("B", "S")
    assert shapes["visual_embeds"] == ("B", "Nv", 128)
    assert (shapes["visual_index"], shapes["text_index"]) == (("B", "Nv"), ("B", "Nt"))
    assert (shapes["last_index"], shapes["slot"]) == (("B",), ("B",))
    assert (shapes["visual_count"], shapes["text_count"]) == (("Bc", "G"), ("Bc",))
    assert shapes["past.0.visual_key"] == ("Bc", 2, "T", 8, 128, 2)
    assert shapes["past.1.visual_key"] == ("Bc", 2, "T", 1, 128, 2)
    assert shapes["past.1.text_value"] == ("Bc", 2, "N", 64)
    _, graph = load(mixed_bundle, "vision")
    assert graph.inputs[0].shape == ("P", 3, 56, 56)
    assert graph.outputs[0].shape == ("16*P", 128)


def test_one_node_a_layer_with_all_attributes(mixed_bundle: Path) -> None:
    model, _ = load(mixed_bundle, "decoder")
    nodes = [node for node in model.graph.node if node.op_type == NAME]
    manifest = Manifest.load(mixed_bundle)
    expected = layer_attributes(manifest.quantization, manifest.model.layers[0].scale)
    assert [node.overload for node in nodes] == ["k8v8", "k1v1"]
    assert [(f.domain, f.name, f.overload) for f in model.functions] == [
        ("vkvx", NAME, "k8v8"),
        ("vkvx", NAME, "k1v1"),
    ]
    for layer, (node, attributes) in enumerate(zip(nodes, expected, strict=True)):
        assert node.domain == "vkvx"
        given = {entry.name: onnx.helper.get_attribute_value(entry) for entry in node.attribute}
        wanted = {k: v.encode() if isinstance(v, str) else pytest.approx(v) for k, v in attributes.to_dict().items()}
        assert given == wanted
        # Caches go straight in and out, so that they can be updated in place.
        caches = [f"{layer}.{tensor.name}" for tensor in OUTPUTS[1:]]
        assert [name for name in node.input if name.startswith("past.")] == [f"past.{name}" for name in caches]
        assert list(node.output[1:]) == [f"present.{name}" for name in caches]
        assert len(node.input) == len(attributes.inputs)


def test_structure(bundle: Path) -> None:
    for name in ("vision", "decoder"):
        model, graph = load(bundle, name)
        assert model.ir_version >= 10
        assert {entry.domain: entry.version for entry in model.opset_import}[""] == graph.opset
        kinds = Counter(node.op_type for node in model.graph.node)
        assert not {"NonZero", "If", "Loop", "Scan"} & set(kinds)
        assert not any(node.doc_string or node.metadata_props for node in model.graph.node)
        # Linear weights stay as they are stored.
        assert kinds["Transpose"] > 0
        inline = sum(len(entry.SerializeToString()) for entry in model.graph.initializer)
        assert inline < 200_000
    assert len(model.graph.node) < 130 * len(Manifest.load(bundle).model.layers)
    onnx.checker.check_model(bundle / "decoder.onnx", full_check=True)
    onnx.checker.check_model(bundle / "vision.onnx", full_check=True)


def test_weights_lie_beside_the_graphs_and_are_shared(bundle: Path) -> None:
    places: dict[str, set[tuple[str, str, str]]] = {}
    for name in ("vision", "decoder"):
        model, _ = load(bundle, name)
        for entry in model.graph.initializer:
            if entry.data_location == TensorProto.EXTERNAL:
                data = {item.key: item.value for item in entry.external_data}
                assert data["location"] in {path.name for path in bundle.glob("*.safetensors")}
                places.setdefault(name, set()).add((data["location"], data["offset"], data["length"]))
    metrics = 2 * 2 if (bundle / METRICS_FILE).exists() else 0
    assert (metrics > 0) == (Manifest.load(bundle).quantization.key_bits[0] != 16)
    assert len(places["decoder"]) == 2 * 9 + 3 + metrics
    assert not places["decoder"] & places["vision"]


def session(bundle: Path, file: str) -> ort.InferenceSession:
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    return ort.InferenceSession(bundle / file, options, providers=["CPUExecutionProvider"])


def test_onnxruntime_takes_any_sizes(checkpoint: Path, mixed_bundle: Path) -> None:
    """The traced file against the same modules run eagerly: sizes 0 and 1, several, slots, idle rows, pictures."""
    manifest = Manifest.load(mixed_bundle)
    reference = load_reference(resolve(checkpoint), manifest, slots=3, visual_tokens=384, text_tokens=40)
    vision, decoder = session(mixed_bundle, "vision.onnx"), session(mixed_bundle, "decoder.onnx")
    rng = np.random.default_rng(0)
    caches = {f"past.{name}": np.array(buffer) for name, buffer in reference.cache.buffers.items()}
    visual_count, text_count = reference.cache.visual_count.copy(), reference.cache.text_count.copy()
    picture = [3] * 16

    def text(slot: int, count: int, position: int = 0) -> Row:
        return Row(slot, rng.integers(4, 500, count), (), position)

    def pictures(slot: int, count: int, position: int = 0) -> Row:
        return Row(slot, np.array([1, *picture * count, 60, 61]), (16,) * count, position)

    idle = Row(-1, np.zeros(0, int))
    calls = [
        [text(2, 5)],
        [pictures(1, 2), idle, text(0, 3)],
        [text(1, 1, 35)],
        [text(0, 1, 3), text(1, 1, 36), text(2, 1, 5)],
        [pictures(0, 1, 4)],
        [pictures(1, 1, 37), pictures(2, 3, 6)],
        [text(2, 7, 57), text(0, 2, 23), idle, text(1, 1, 56)],
    ]
    for rows in calls:
        call = build_call(rows, group_size=128, image_token_id=3)
        count = sum(len(row.picture_lengths) for row in rows)
        visual = np.zeros((*call.visual_index.shape, manifest.model.hidden_size), np.float32)
        if count:
            pixels = rng.standard_normal((count, 3, 56, 56)).astype(np.float32)
            (embeds,) = vision.run(None, {"pixel_values": pixels})
            np.testing.assert_allclose(embeds, reference.encode({"pixel_values": pixels}), rtol=1e-4, atol=1e-4)
            visual = place_embeds(call, embeds)
        expected = reference.step(call, visual)
        names = ("input_ids", "position_ids", "visual_index", "text_index", "last_index", "slot")
        feed = {name: getattr(call, name) for name in names}
        feed |= {"visual_embeds": visual, "visual_count": visual_count, "text_count": text_count, **caches}
        logits, visual_count, text_count, *presents = decoder.run(None, feed)
        caches = dict(zip(caches, presents, strict=True))
        np.testing.assert_array_equal(visual_count, reference.cache.visual_count)
        np.testing.assert_array_equal(text_count, reference.cache.text_count)
        live = call.slot >= 0
        np.testing.assert_allclose(logits[live], expected[live], rtol=0, atol=2e-3 * np.ptp(expected))
        assert np.isfinite(logits).all()


def test_baseline_in_onnxruntime(checkpoint: Path, baseline_bundle: Path) -> None:
    """Opset 17, FP16: empty visual caches, both kinds of tokens in the text rows."""
    manifest = Manifest.load(baseline_bundle)
    reference = load_reference(resolve(checkpoint), manifest, slots=1, visual_tokens=16, text_tokens=8)
    decoder = session(baseline_bundle, "decoder.onnx")
    pixels = np.random.default_rng(0).standard_normal((1, 3, 56, 56)).astype(np.float32)
    (embeds,) = session(baseline_bundle, "vision.onnx").run(None, {"pixel_values": pixels})
    caches = {f"past.{name}": np.array(buffer) for name, buffer in reference.cache.buffers.items()}
    counts = reference.cache.visual_count.copy(), reference.cache.text_count.copy()
    call = build_call([Row(0, np.array([1, *[3] * 16, 60]), (16,))], group_size=128, image_token_id=3)
    visual = place_embeds(call, embeds)
    names = ("input_ids", "position_ids", "visual_index", "text_index", "last_index", "slot")
    feed = {name: getattr(call, name) for name in names}
    feed |= {"visual_embeds": visual, "visual_count": counts[0], "text_count": counts[1], **caches}
    logits, _, text_count, *_ = decoder.run(None, feed)
    expected = reference.step(call, visual)
    np.testing.assert_allclose(logits, expected, rtol=0, atol=2e-2 * np.ptp(expected))
    assert text_count.tolist() == [18]


def test_schema_is_the_definition_table() -> None:
    schema = operator_schema()
    assert [entry.name for entry in schema.inputs] == [entry.name for entry in ALL_INPUTS]
    optional = onnx.defs.OpSchema.FormalParameterOption.Optional
    assert [entry.name for entry in schema.inputs if entry.option == optional] == [
        t.name for t in ALL_INPUTS[len(INPUTS) :]
    ]
    assert [entry.name for entry in schema.outputs] == [entry.name for entry in OUTPUTS]
    defaults = {name: onnx.helper.get_attribute_value(entry.default_value) for name, entry in schema.attributes.items()}
    expected = OperatorAttributes().to_dict()
    assert defaults == {k: v.encode() if isinstance(v, str) else pytest.approx(v) for k, v in expected.items()}


class Function(nn.Module):
    """A module of one function, to trace."""

    def __init__(self, function: Callable[[Tensor], Tensor]):
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x)


def traced(function: Callable[[Tensor], Tensor], shape: tuple[Any, ...], opset: int = 18) -> Any:
    inputs, outputs = TensorSpec("x", "float32", ("B", 4)), TensorSpec("y", "float32", shape)
    return trace(Function(function), [inputs], [outputs], opset=opset).model


def test_a_frozen_dimension_is_refused() -> None:
    assert [node.op_type for node in traced(lambda x: x + 1, ("B", 4)).graph] == ["Add"]
    with pytest.raises(ModelError, match=r"expected float32 \['B', 4\]"):
        traced(lambda x: x[:1] + 1, ("B", 4))
    with pytest.raises(ModelError, match=r"expected float32 \['B', 5\]"):
        traced(lambda x: x + 1, ("B", 5))


def test_code_for_one_size_only_is_refused() -> None:
    with pytest.raises(ModelError, match=r"cannot export Function: .*B") as caught:
        traced(lambda x: x.reshape(3, 4) + 1, ("B", 4))
    assert "\n" not in str(caught.value)


def test_data_dependent_shapes_are_refused() -> None:
    with pytest.raises(ModelError, match="NonZero"):
        traced(lambda x: x.nonzero().float(), ("n", 2))


def test_opset_17_has_axes_as_attributes() -> None:
    model = traced(lambda x: x.mean(1), ("B",), opset=17)
    (node,) = list(model.graph)
    assert (node.op_type, len(node.inputs), list(node.attributes["axes"].value)) == ("ReduceMean", 1, [1])
    assert model.opset_imports[""] == 17


def test_opset_17_refuses_what_it_lacks() -> None:
    with pytest.raises(ModelError, match=r"needs \w+ of opset 18; give --opset 18"):
        traced(lambda x: torch.bitwise_and(x.int(), 3).float(), ("B", 4), opset=17)
