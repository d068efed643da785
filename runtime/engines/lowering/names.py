"""Names: bodies of loops that were copied into each layer must not share them."""

from __future__ import annotations

import onnx_ir as ir
from onnx_ir.passes import InPlacePass, PassResult, PostconditionError


class UniqueNames(InPlacePass):
    """Gives every value of the graph and of the graphs inside it, and every node, a name of its own.

    Inputs, outputs and initializers of the graph itself keep theirs.
    """

    def call(self, model: ir.Model) -> PassResult:
        """See the class."""
        graph = model.graph
        kept = [*graph.inputs, *graph.outputs, *graph.initializers.values()]
        taken = {value.name for value in kept}
        changed = False
        for value in _values(model):
            if any(value is other for other in (kept if value.name in taken else ())):
                continue
            name = _free(value.name or "value", taken)
            changed |= name != value.name
            value.name = name
            taken.add(name)
        names: set[str | None] = set()
        for node in ir.traversal.RecursiveGraphIterator(graph):
            name = _free(node.name or node.op_type, names)
            changed |= name != node.name
            node.name = name
            names.add(name)
        return PassResult(model, changed)

    def ensures(self, model: ir.Model) -> None:
        """No name is there twice."""
        names = [value.name for value in _values(model)]
        if len(names) != len(set(names)) or not all(names):
            raise PostconditionError("values share names")


def _values(model: ir.Model) -> list[ir.Value]:
    """Values that nodes of the graph make, and inputs of the graphs inside it."""
    found: list[ir.Value] = []
    for node in ir.traversal.RecursiveGraphIterator(model.graph):
        found.extend(node.outputs)
        for attribute in node.attributes.values():
            if attribute.type == ir.AttributeType.GRAPH:
                found.extend(list(attribute.as_graph().inputs))
    return found


def _free(name: str, taken: set[str | None]) -> str:
    number, given = 1, name
    while name in taken:
        number += 1
        name = f"{given}.{number}"
    return name
