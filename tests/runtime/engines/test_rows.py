"""The pass for TensorRT 8.6 that places picture embeddings and takes last positions by products."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
from onnx_ir.passes import PassError, PostconditionError

from vkvx.manifest import Manifest
from vkvx.runtime.backends import golden
from vkvx.runtime.backends.onnxruntime.backend import OnnxRuntimeBackend
from vkvx.runtime.calls import Row, build_call
from vkvx.runtime.engines.dialect import Dialect
from vkvx.runtime.engines.lowering import passes
from vkvx.runtime.engines.lowering.rows import PlaceByProduct

TENSORRT8 = Dialect("8.6.0", opset=17, bfloat16=False, shape_and_reshape_attributes=False)
PICTURE, GROUP, IMAGE = 576, 640, 3


def rewritten(bundle: Path) -> ir.Model:
    model = ir.load(bundle / "decoder.onnx")
    one = PlaceByProduct()
    assert one(model).modified
    one.ensures(model)
    return model


def calls(bundle: Path, manifest: Manifest) -> list[np.ndarray]:
    """Logits of live rows: of different length, with none to two pictures; a step with an idle row; a second turn."""
    capacity = {"slots": 4, "visual_tokens": 2 * GROUP, "text_tokens": 64}
    backend = OnnxRuntimeBackend(bundle, manifest, provider="cpu", threads=1, **capacity)
    embeds, found = backend.encode(golden.picture(manifest).arrays), []

    def step(*rows: tuple[int, int, int]) -> None:
        fed = []
        for slot, text, pictures in rows:
            ids = [IMAGE] * (PICTURE * pictures) + golden.text(manifest, text, slot + 1)
            fed.append(
                Row(
                    slot, np.array(ids, np.int32), (PICTURE,) * pictures, backend.cache.length(slot) if slot >= 0 else 0
                )
            )
        call = build_call(fed, group_size=GROUP, image_token_id=IMAGE)
        count = sum(pictures for _, _, pictures in rows)
        if not count:  # as engines of TensorRT 8.6 get it
            nothing = np.full((len(rows), GROUP), -1, np.int32)
            call = replace(call, visual_index=nothing, visual_rows=nothing)
        logits = backend.step(call, backend.place(call, [embeds] * count) if count else None)
        found.append(logits[call.slot >= 0])

    step((2, 5, 1), (0, 1, 0), (3, 9, 2))
    step((0, 1, 0), (2, 1, 0), (-1, 0, 0), (3, 1, 0))
    step((2, 4, 1), (0, 7, 0))
    step((0, 1, 0), (2, 1, 0))
    return found


@pytest.mark.parametrize("bits", [1, 16])
def test_logits_stay_the_same(bits: int, bundle_factory: Any, own_copy: Any) -> None:
    bundle = bundle_factory(bits=bits)
    manifest = Manifest.load(bundle)
    expected = calls(bundle, manifest)
    changed = own_copy(bundle)
    model = rewritten(changed)
    contents = ir.to_proto(model).SerializeToString()
    (changed / "decoder.onnx").write_bytes(contents)
    for actual, wanted in zip(calls(changed, manifest), expected, strict=True):
        np.testing.assert_allclose(actual, wanted, atol=0.002 * np.ptp(wanted))


def test_nothing_is_computed_from_sizes_where_rows_are_chosen(tiny_bundle: Path) -> None:
    """What ends in the layers' inputs or in the logits multiplies and adds no size of a tensor."""
    model = rewritten(tiny_bundle)
    assert not any(node.op_type == "ScatterND" and not node.domain for node in model.graph)
    logits = next(value for value in model.graph.outputs if value.name == "logits")
    seen: set[ir.Node] = set()
    pending = [logits.producer()]
    while pending:
        node = pending.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        # Targets of reshapes are sizes, and stay so.
        inputs = node.inputs[:1] if node.op_type in ("Reshape", "Expand") else node.inputs
        pending += [value.producer() for value in inputs if value is not None]
    assert "MatMul" in {node.op_type for node in seen}
    assert {"Shape", "Range"} & {node.op_type for node in seen} == set()


def test_the_vision_tower_is_left_alone(tiny_bundle: Path) -> None:
    assert not PlaceByProduct()(ir.load(tiny_bundle / "vision.onnx")).modified


def test_a_graph_of_another_form_is_refused(tiny_bundle: Path) -> None:
    model = ir.load(tiny_bundle / "decoder.onnx")
    with pytest.raises(PostconditionError, match="ScatterND"):
        PlaceByProduct().ensures(model)
    gone = rewritten(tiny_bundle)
    with pytest.raises(PassError, match="0 nodes ScatterND"):
        PlaceByProduct().call(gone)


def test_it_is_for_tensorrt_8_with_the_plugin_only() -> None:
    def kinds(dialect: Dialect, plugin_free: bool) -> set[type]:
        return {type(one) for one in passes(dialect, plugin_free=plugin_free)}

    assert PlaceByProduct in kinds(TENSORRT8, False)
    assert PlaceByProduct not in kinds(TENSORRT8, True)
    newer = replace(TENSORRT8, opset=None, shape_and_reshape_attributes=True)
    assert PlaceByProduct not in kinds(newer, False)
