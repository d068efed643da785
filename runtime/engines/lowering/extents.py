"""Sizes that depend on data: the operator's function reads no more of a cache than the longest row of a call uses.

TensorRT knows sizes before it knows data. Reading all of the cache gives the same result: what lies past the counts is
masked.
"""

from __future__ import annotations

import onnx_ir as ir
from onnx_ir.passes import InPlacePass, PassResult, PostconditionError

COUNTS = {"text_count": ("past.0.text_key", 2), "visual_count": ("visual_count", 1)}
"""Graph inputs that hold counts, and where their upper bound is found: an input and its axis."""


class StaticExtents(InPlacePass):
    """Replaces the scalar ``ReduceMax`` of counts with the capacity that bounds them."""

    def call(self, model: ir.Model) -> PassResult:
        """See the class."""
        graph = model.graph
        inputs = {value.name: value for value in graph.inputs}
        capacities: dict[str, ir.Value] = {}
        for node in _maxima(graph):
            count = _count(node)
            if count is None:
                continue
            if count not in capacities:
                name, axis = COUNTS[count]
                capacities[count] = _dimension(graph, inputs[name], axis)
            ir.convenience.replace_all_uses_with(node.outputs[0], capacities[count])
            graph.remove(node, safe=True)
        return PassResult(model, bool(capacities))

    def ensures(self, model: ir.Model) -> None:
        """No maximum of counts is left."""
        left = [node.name for node in _maxima(model.graph) if _count(node) is not None]
        if left:
            raise PostconditionError(f"sizes depend on counts: {left}")


def _maxima(graph: ir.Graph) -> list[ir.Node]:
    """The nodes that reduce all axes."""
    nodes = (node for node in graph if node.op_type == "ReduceMax")
    return [node for node in nodes if len(node.inputs) == 1 and "axes" not in node.attributes]


def _count(node: ir.Node) -> str | None:
    """The graph input in ``COUNTS`` that a value is computed from; None if there is none."""
    seen: set[ir.Value] = set()
    todo = [value for value in node.inputs if value is not None]
    while todo:
        value = todo.pop()
        if value.name in COUNTS and value.is_graph_input():
            return value.name
        producer = value.producer()
        if value in seen or producer is None:
            continue
        seen.add(value)
        todo.extend(v for v in producer.inputs if v is not None)
    return None


def _dimension(graph: ir.Graph, value: ir.Value, axis: int) -> ir.Value:
    """One dimension of a graph input, INT64 scalar, computed at the start of the graph."""
    axis_node = ir.node("Constant", [], {"value_int": axis})
    shape = ir.node("Shape", [value])
    size = ir.node("Gather", [shape.outputs[0], axis_node.outputs[0]])
    size.outputs[0].dtype, size.outputs[0].shape = ir.DataType.INT64, ir.Shape([])
    graph.insert_before(graph[0], [axis_node, shape, size])
    return size.outputs[0]
