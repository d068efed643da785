"""Branches: the operator's function skips the quantiser in calls without pictures.

Both branches give tensors of other sizes, which TensorRT refuses. Engines without the plugin get a group of padding in
place of no picture, so that they always quantise.
"""

from __future__ import annotations

import onnx_ir as ir
from onnx_ir.passes import InPlacePass, PassResult, PostconditionError


class TakeBranch(InPlacePass):
    """Puts the then-branch in place of an If that asks whether a dimension of a graph input is greater than 0."""

    def call(self, model: ir.Model) -> PassResult:
        """See the class."""
        nodes = [node for node in model.graph if node.op_type == "If" and _asks_for_size(node.inputs[0])]
        for node in nodes:
            branch = node.attributes["then_branch"].as_graph()
            body, results = list(branch), list(branch.outputs)
            branch.outputs.clear()
            branch.remove(body)
            ir.convenience.replace_nodes_and_values(model.graph, node, [node], body, node.outputs, results)
        return PassResult(model, bool(nodes))

    def ensures(self, model: ir.Model) -> None:
        """No If is left."""
        if left := [node.name for node in ir.traversal.RecursiveGraphIterator(model.graph) if node.op_type == "If"]:
            raise PostconditionError(f"branches depend on data: {left}")


def _asks_for_size(condition: ir.Value | None) -> bool:
    """Whether a value is ``Gather(Shape(graph input), constant) > 0``."""
    greater = condition.producer() if condition is not None else None
    if greater is None or greater.op_type != "Greater" or _constant(greater.inputs[1]) != 0:
        return False
    gather = greater.inputs[0].producer()
    shape = gather.inputs[0].producer() if gather is not None and gather.op_type == "Gather" else None
    return shape is not None and shape.op_type == "Shape" and shape.inputs[0].is_graph_input()


def _constant(value: ir.Value | None) -> object:
    tensor = ir.convenience.get_const_tensor(value) if value is not None else None
    return None if tensor is None else tensor.numpy().item()
