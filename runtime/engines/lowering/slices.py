"""Slices: TensorRT wants the axes said."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
from onnx_ir.passes import InPlacePass, PassResult, PostconditionError


class SliceAxes(InPlacePass):
    """Adds the axes 0, 1, ... that a Slice without axes means."""

    def call(self, model: ir.Model) -> PassResult:
        """See the class."""
        nodes = _without_axes(model)
        for node in nodes:
            starts = ir.convenience.get_const_tensor(node.inputs[1])
            if starts is None:
                continue
            axes = ir.node("Constant", [], {"value": ir.tensor(np.arange(starts.size, dtype=np.int64))})
            node.graph.insert_before(node, axes)
            node.resize_inputs(max(4, len(node.inputs)))
            node.replace_input_with(3, axes.outputs[0])
        return PassResult(model, bool(nodes))

    def ensures(self, model: ir.Model) -> None:
        """Every Slice has axes."""
        if nodes := _without_axes(model):
            raise PostconditionError(f"{nodes[0].name} has no axes, and its starts are not constant")


def _without_axes(model: ir.Model) -> list[ir.Node]:
    return [
        node
        for node in ir.traversal.RecursiveGraphIterator(model.graph)
        if node.op_type == "Slice" and (len(node.inputs) < 4 or node.inputs[3] is None)
    ]
