"""Attributes of ``Shape`` and ``Reshape`` that the parser of TensorRT 8.6 ignores."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
from onnx_ir.passes import InPlacePass, PassResult, PostconditionError


class WholeShape(InPlacePass):
    """Takes the dimensions that a Shape with start and end means out of the whole shape, by Gather.

    The dimensions must be given by number: the rank of the input is not known to be.
    """

    def call(self, model: ir.Model) -> PassResult:
        """See the class."""
        changed = False
        for node in _nodes(model, "Shape"):
            start, end = node.attributes.get_int("start", 0), node.attributes.get_int("end", None)
            rank = None if node.inputs[0] is None or node.inputs[0].shape is None else len(node.inputs[0].shape)
            if start == 0 and end is None:
                continue
            if rank is not None:
                start, end, _ = slice(start, end).indices(rank)
            if end is None or start < 0 or end < 0:
                continue
            shape = ir.node("Shape", [node.inputs[0]])
            axes = ir.node("Constant", [], {"value": ir.tensor(np.arange(start, end, dtype=np.int64))})
            taken = ir.node("Gather", [shape.outputs[0], axes.outputs[0]], {"axis": 0}, name=node.name)
            assert node.graph is not None
            new = [shape, axes, taken]
            ir.convenience.replace_nodes_and_values(node.graph, node, [node], new, node.outputs, taken.outputs)
            changed = True
        return PassResult(model, changed)

    def ensures(self, model: ir.Model) -> None:
        """Every Shape is whole."""
        for node in _nodes(model, "Shape"):
            if node.attributes.get_int("start", 0) != 0 or "end" in node.attributes:
                raise PostconditionError(f"{node.name} gives part of a shape of unknown rank")


class PlainReshape(InPlacePass):
    """Takes ``allowzero`` off each Reshape whose target holds no constant 0.

    Targets joined from sizes may hold a 0 at run time all the same; that would copy the input's dimension. It does not
    come up: engines for versions that need this pass get no empty indices, and other sizes are at least 1.
    """

    def call(self, model: ir.Model) -> PassResult:
        """See the class."""
        changed = False
        for node in _nodes(model, "Reshape"):
            if not node.attributes.get_int("allowzero", 0) or not _may_mean_empty(node.inputs[1]):
                changed |= node.attributes.pop("allowzero", None) is not None
        return PassResult(model, changed)

    def ensures(self, model: ir.Model) -> None:
        """No Reshape has allowzero."""
        for node in _nodes(model, "Reshape"):
            if "allowzero" in node.attributes:
                raise PostconditionError(f"{node.name} reshapes to a target that holds a constant 0")


def _may_mean_empty(target: ir.Value | None) -> bool:
    constant = ir.convenience.get_const_tensor(target) if target is not None else None
    if constant is not None:
        return bool((constant.numpy() == 0).any())
    producer = target.producer() if target is not None else None
    if producer is not None and producer.op_type == "Concat":
        return any(
            (tensor := ir.convenience.get_const_tensor(part)) is not None and bool((tensor.numpy() == 0).any())
            for part in producer.inputs
            if part is not None
        )
    return False


def _nodes(model: ir.Model, op_type: str) -> list[ir.Node]:
    graph = model.graph
    return [n for n in ir.traversal.RecursiveGraphIterator(graph) if n.op_type == op_type and not n.domain]
