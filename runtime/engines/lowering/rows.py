"""Rows that are chosen by index, as products with zeros and ones.

TensorRT 8.6 does not build kernels that compute with a size of another tensor, which a flat index b * S + s needs
("missing in the shape_remap table"). Here nothing is computed from sizes: where a position is in its row follows from
``position_ids``, which count on from the first. The products are exact: each sum has one term that is not zero.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import onnx_ir as ir
from onnx_ir.passes import InPlacePass, PassError, PassResult, PostconditionError
from onnx_ir.passes.common import RemoveUnusedNodesPass


class PlaceByProduct(InPlacePass):
    """Puts ``visual_embeds`` in their places and takes the rows of ``last_index`` without a scatter or a flat index."""

    def call(self, model: ir.Model) -> PassResult:
        """See the class; graphs without these inputs, such as the vision tower, stay as they are."""
        graph = model.graph
        inputs = {value.name: value for value in graph.inputs}
        if not {"visual_embeds", "visual_index", "last_index", "position_ids"} <= set(inputs):
            return PassResult(model, False)
        if inputs["position_ids"].shape is None or len(inputs["position_ids"].shape) not in (2, 3):
            raise PassError("position_ids are neither [B, S] nor [B, rows, S]")
        scatter = _only(graph, "ScatterND")
        cut = _user(_user(scatter, "Reshape"), "Slice")
        texts = _producer(_producer(scatter.inputs[0], "Reshape").inputs[0], "Concat").inputs[0]
        _replace(graph, cut, _placed(inputs, texts))
        gather = next(_gathers(inputs["last_index"]), None)
        if gather is None:
            raise PassError("no Gather takes rows by last_index")
        _replace(graph, gather, _last(inputs, _producer(gather.inputs[0], "Reshape").inputs[0]))
        RemoveUnusedNodesPass()(model)
        return PassResult(model, True)

    def ensures(self, model: ir.Model) -> None:
        """There is no scatter."""
        if any(node.op_type == "ScatterND" and not node.domain for node in model.graph):
            raise PostconditionError("embeddings are still placed by a ScatterND")


class _Builder:
    """Makes nodes one after another."""

    def __init__(self) -> None:
        self.nodes: list[ir.Node] = []

    def __call__(self, op_type: str, *inputs: ir.Value | None, **attributes: int) -> ir.Value:
        node = ir.node(op_type, inputs, attributes)
        self.nodes.append(node)
        return node.outputs[0]

    def constant(self, values: object, dtype: type) -> ir.Value:
        node = ir.node("Constant", [], {"value": ir.tensor(np.array(values, dtype))})
        self.nodes.append(node)
        return node.outputs[0]

    def cast(self, value: ir.Value, dtype: ir.DataType) -> ir.Value:
        return self("Cast", value, to=int(dtype))

    def unsqueeze(self, value: ir.Value, axis: int) -> ir.Value:
        return self("Unsqueeze", value, self.constant([axis], np.int64))

    def places(self, position_ids: ir.Value) -> ir.Value:
        """0, 1, 2, ... in each row, FP32 [B, S]."""
        if position_ids.shape is not None and len(position_ids.shape) == 3:  # the plain index comes first
            position_ids = self("Gather", position_ids, self.constant(0, np.int64), axis=1)
        first = self("Gather", position_ids, self.constant([0], np.int64), axis=1)
        return self.cast(self("Sub", position_ids, first), ir.DataType.FLOAT)

    def equal(self, left: ir.Value, right: ir.Value) -> ir.Value:
        """1.0 where whole numbers in FP32 are equal, else 0.0."""
        return self("Relu", self("Sub", self.constant(1, np.float32), self("Abs", self("Sub", left, right))))


def _placed(inputs: dict[str | None, ir.Value], texts: ir.Value | None) -> tuple[list[ir.Node], ir.Value]:
    """Embeddings [B, S, H]: those of text, and those of pictures where ``visual_index`` says."""
    build, dtype = _Builder(), _dtype(inputs["visual_embeds"])
    places = build.unsqueeze(build.places(inputs["position_ids"]), 2)
    index = build.unsqueeze(build.cast(inputs["visual_index"], ir.DataType.FLOAT), 1)
    chosen = build.equal(places, index)  # [B, S, Nv]
    placed = build("MatMul", build.cast(chosen, dtype), inputs["visual_embeds"])
    is_visual = build("ReduceSum", chosen, build.constant([2], np.int64), keepdims=1)
    is_text = build.cast(build("Sub", build.constant(1, np.float32), is_visual), dtype)
    return build.nodes, build("Add", build("Mul", texts, is_text), placed)


def _last(inputs: dict[str | None, ir.Value], hidden: ir.Value | None) -> tuple[list[ir.Node], ir.Value]:
    """The rows [B, H] of ``hidden`` [B, S, H] at ``last_index``."""
    build = _Builder()
    index = build.unsqueeze(build.cast(inputs["last_index"], ir.DataType.FLOAT), 1)
    chosen = build.cast(build.equal(build.places(inputs["position_ids"]), index), _dtype(inputs["visual_embeds"]))
    rows = build("Mul", hidden, build.unsqueeze(chosen, 2))
    return build.nodes, build("ReduceSum", rows, build.constant([1], np.int64), keepdims=0)


def _replace(graph: ir.Graph, node: ir.Node, made: tuple[list[ir.Node], ir.Value]) -> None:
    nodes, value = made
    ir.convenience.replace_nodes_and_values(graph, node, [node], nodes, node.outputs, [value])


def _dtype(value: ir.Value) -> ir.DataType:
    if value.dtype is None:
        raise PassError(f"{value.name} has no type")
    return value.dtype


def _only(graph: ir.Graph, op_type: str) -> ir.Node:
    found = [node for node in graph if node.op_type == op_type and not node.domain]
    if len(found) != 1:
        raise PassError(f"{len(found)} nodes {op_type}, expected one")
    return found[0]


def _producer(value: ir.Value | None, op_type: str) -> ir.Node:
    node = None if value is None else value.producer()
    if node is None or node.op_type != op_type:
        raise PassError(f"{value.name if value else 'nothing'} comes from no {op_type}")
    return node


def _user(node: ir.Node, op_type: str) -> ir.Node:
    found = [user for user, _ in node.outputs[0].uses() if user.op_type == op_type]
    if len(found) != 1:
        raise PassError(f"{node.name} goes to {len(found)} nodes {op_type}, expected one")
    return found[0]


def _gathers(value: ir.Value) -> Iterator[ir.Node]:
    """Nodes Gather that a value reaches as the index, through other nodes."""
    for node, place in value.uses():
        if node.op_type == "Gather" and place == 1:
            yield node
        elif node.op_type in ("Add", "Reshape", "Cast"):
            yield from _gathers(node.outputs[0])
