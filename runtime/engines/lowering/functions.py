"""Local functions: TensorRT looks for a plugin only where there is none, and inlines no overloads."""

from __future__ import annotations

import onnx_ir as ir
from onnx_ir.passes import InPlacePass, PassResult, PostconditionError
from onnx_ir.passes.common import InlinePass


class StripFunctions(InPlacePass):
    """Leaves the nodes that call local functions, without overload, and drops the functions."""

    def call(self, model: ir.Model) -> PassResult:
        """See the class."""
        functions = set(model.functions)
        calls = [node for node in ir.traversal.RecursiveGraphIterator(model.graph) if node.op_identifier() in functions]
        for node in calls:
            node.overload = ""
        model.functions.clear()
        return PassResult(model, bool(functions))

    def ensures(self, model: ir.Model) -> None:
        """No functions, no overloads."""
        if model.functions or any(node.overload for node in ir.traversal.RecursiveGraphIterator(model.graph)):
            raise PostconditionError("functions or overloads are left")


class InlineFunctions(InPlacePass):
    """Puts the bodies of local functions in place of the nodes that call them."""

    def call(self, model: ir.Model) -> PassResult:
        """See the class."""
        changed = bool(model.functions)
        InlinePass()(model)
        model.functions.clear()
        for domain in set(model.opset_imports) - {""}:
            del model.opset_imports[domain]
        return PassResult(model, changed)

    def ensures(self, model: ir.Model) -> None:
        """Only operators of ONNX itself."""
        left = {node.domain for node in ir.traversal.RecursiveGraphIterator(model.graph)} - {""}
        if model.functions or left:
            raise PostconditionError(f"nodes of {sorted(left)} are left")
