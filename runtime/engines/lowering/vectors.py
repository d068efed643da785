"""Vectors: TensorRT finds the largest element of a matrix, not of a vector."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
from onnx_ir.passes import InPlacePass, PassResult, PostconditionError


class ArgMaxOfMatrix(InPlacePass):
    """Gives what an ArgMax or ArgMin along the first axis looks at one more axis in front, and takes it off again."""

    def call(self, model: ir.Model) -> PassResult:
        """See the class."""
        nodes = _along_first_axis(model)
        for node in nodes:
            axes = ir.node("Constant", [], {"value": ir.tensor(np.array([0], np.int64))})
            matrix = ir.node("Unsqueeze", [node.inputs[0], axes.outputs[0]])
            found = ir.node(
                node.op_type, [matrix.outputs[0]], {**node.attributes, "axis": ir.AttrInt64("axis", 1)}, name=node.name
            )
            result = ir.node("Squeeze", [found.outputs[0], axes.outputs[0]])
            assert node.graph is not None
            new = [axes, matrix, found, result]
            ir.convenience.replace_nodes_and_values(node.graph, node, [node], new, node.outputs, result.outputs)
        return PassResult(model, bool(nodes))

    def ensures(self, model: ir.Model) -> None:
        """No ArgMax or ArgMin is along the first axis."""
        if nodes := _along_first_axis(model):
            raise PostconditionError(f"{nodes[0].name} is along the first axis")


def _along_first_axis(model: ir.Model) -> list[ir.Node]:
    return [
        node
        for node in ir.traversal.RecursiveGraphIterator(model.graph)
        if node.op_type in ("ArgMax", "ArgMin") and not node.domain and node.attributes.get_int("axis", 0) == 0
    ]
