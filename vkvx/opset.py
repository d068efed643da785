"""Writes a graph of opset 18 as one of opset 17, which older consumers (TensorRT 8.6) are limited to."""

from __future__ import annotations

import onnx
import onnx_ir as ir

from vkvx.errors import ModelError

OLD, NEW = 17, 18
_REDUCTIONS = ("ReduceMean", "ReduceMax", "ReduceMin", "ReduceProd", "ReduceL1", "ReduceL2", "ReduceSumSquare")
_EXTENDED = {"ScatterND": "reduction", "ScatterElements": "reduction", "Split": "num_outputs", "Pad": "axes"}
"""Operators whose version of opset 18 only adds an attribute or an input of this name."""


def lower_opset(model: ir.Model) -> None:
    """Convert in place, graphs inside nodes too. Raises ModelError if a node needs what only opset 18 has."""
    for node in ir.traversal.RecursiveGraphIterator(model.graph):
        if node.domain:
            continue
        if not onnx.defs.has(node.op_type, max_inclusive_version=OLD):
            raise _refusal(node)
        versions = {opset: onnx.defs.get_schema(node.op_type, opset).since_version for opset in (OLD, NEW)}
        if versions[OLD] == versions[NEW]:
            continue
        if node.op_type in _REDUCTIONS:
            _axes_to_attribute(node)
        elif node.op_type in _EXTENDED:
            name = _EXTENDED[node.op_type]
            value = node.attributes.get_string(name, "none") if name == "reduction" else node.attributes.get(name)
            if node.op_type == "Split" and value is not None and _splits_evenly(node):
                node.attributes.pop(name)  # what opset 17 does by itself
            elif value not in ("none", None) or (node.op_type == "Pad" and len(node.inputs) > 3):
                raise _refusal(node)
        else:
            raise _refusal(node)
    model.opset_imports[""] = OLD


def _splits_evenly(node: ir.Node) -> bool:
    """Whether a Split into a number of outputs makes parts of one size."""
    shape = None if node.inputs[0] is None else node.inputs[0].shape
    size = None if shape is None else shape[node.attributes.get_int("axis", 0)]
    return isinstance(size, int) and size % len(node.outputs) == 0


def _axes_to_attribute(node: ir.Node) -> None:
    if len(node.inputs) > 1 and node.inputs[1] is not None:
        axes = ir.convenience.get_const_tensor(node.inputs[1])
        if axes is None:
            raise _refusal(node)
        node.attributes["axes"] = ir.AttrInt64s("axes", axes.numpy().reshape(-1).tolist())
        node.resize_inputs(1)
    elif node.attributes.get_int("noop_with_empty_axes", 0):
        raise _refusal(node)
    node.attributes.pop("noop_with_empty_axes", None)


def _refusal(node: ir.Node) -> ModelError:
    return ModelError(f"this model's graph needs {node.op_type} of opset {NEW}; give --opset {NEW}")
