"""Unsigned integers, which TensorRT lacks: the operator's function splits INT32 words into bytes as UINT32."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
from onnx_ir.passes import InPlacePass, PassResult, PostconditionError

_INT32_MIN = np.iinfo(np.int32).min
_UNSIGNED = (ir.DataType.UINT8, ir.DataType.UINT16, ir.DataType.UINT32, ir.DataType.UINT64)


class SignedWords(InPlacePass):
    """Rewrites ``Cast(Cast(Cast(words, UINT32) / shifts, UINT8), INT32)`` in INT32 arithmetic, bit for bit.

    The sign bit is taken off, the other bits divided, and the bit put back into the byte that holds it.
    Casts from bool by way of UINT8, which only onnxruntime is faster with, become direct ones.
    """

    def call(self, model: ir.Model) -> PassResult:
        """See the class."""
        changed = False
        for node in list(ir.traversal.RecursiveGraphIterator(model.graph)):
            if node.op_type != "Cast" or node.attributes["to"].as_int() != ir.DataType.UINT8:
                continue
            for use in list(node.outputs[0].uses()):
                cast = use.node
                if cast.op_type != "Cast":
                    continue
                source = node.inputs[0]
                assert source is not None
                parts = _division(source)
                if parts is None:  # from bool
                    cast.replace_input_with(0, source)
                else:
                    new = _bytes(*parts)
                    ir.convenience.replace_nodes_and_values(
                        cast.graph, cast, [cast], new, cast.outputs, new[-1].outputs
                    )
                changed = True
        if changed:
            ir.passes.common.RemoveUnusedNodesPass()(model)
        return PassResult(model, changed)

    def ensures(self, model: ir.Model) -> None:
        """No unsigned type is left."""
        for node in ir.traversal.RecursiveGraphIterator(model.graph):
            if node.op_type == "Cast" and node.attributes["to"].as_int() in _UNSIGNED:
                raise PostconditionError(f"{node.name} makes unsigned integers")


def _division(value: ir.Value) -> tuple[ir.Value, ir.Value, np.ndarray] | None:
    """(words, axes, shifts) of ``Unsqueeze(Cast(words, UINT32), axes) / shifts``; None for any other value."""
    divide = value.producer()
    if divide is None or divide.op_type != "Div":
        return None
    unsqueeze, shifts = divide.inputs[0].producer(), ir.convenience.get_const_tensor(divide.inputs[1])
    if unsqueeze is None or unsqueeze.op_type != "Unsqueeze" or shifts is None:
        return None
    cast = unsqueeze.inputs[0].producer()
    if cast is None or cast.op_type != "Cast" or cast.attributes["to"].as_int() != ir.DataType.UINT32:
        return None
    return cast.inputs[0], unsqueeze.inputs[1], shifts.numpy()


def _bytes(words: ir.Value, axes: ir.Value, shifts: np.ndarray) -> list[ir.Node]:
    """Nodes that make INT32 bytes of INT32 words, the last one giving the result."""
    nodes: list[ir.Node] = []

    def op(op_type: str, *operands: ir.Value | np.ndarray) -> ir.Value:
        inputs = []
        for operand in operands:
            if isinstance(operand, ir.Value):
                inputs.append(operand)
            else:
                constant = ir.node("Constant", [], {"value": ir.tensor(operand)})
                nodes.append(constant)
                inputs.append(constant.outputs[0])
        node = ir.node(op_type, inputs)
        nodes.append(node)
        return node.outputs[0]

    word = op("Unsqueeze", words, axes)
    negative = op("Less", word, np.int32(0))
    magnitude = op("Where", negative, op("Sub", word, np.int32(_INT32_MIN)), word)
    shifted = op("Div", magnitude, shifts.astype(np.int32))
    low = op("Sub", shifted, op("Mul", op("Div", shifted, np.int32(256)), np.int32(256)))
    sign = np.where(shifts == 2**24, 128, 0).astype(np.int32)
    op("Add", low, op("Where", negative, sign, np.int32(0)))
    return nodes
