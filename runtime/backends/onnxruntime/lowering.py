"""The decoder graph for the custom operator of ``libvkvx_onnxruntime``: what onnxruntime's CUDA provider runs best.

The operator's functions go, and so do the new counts, which the host knows; root mean square norms become one node.
(So could rotary embeddings, but onnxruntime's node for them, as of 1.31, cannot be captured in a CUDA graph.)
Sizes that are numbers of the model are put on the GPU by nodes of the GPU: where the provider has to copy one from main
memory it captures no CUDA graph.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
import onnx
from onnx import helper, numpy_helper

from vkvx.runtime.backends.onnxruntime.fusions import ATTENTION, Uses, fuse_norms, prune

COUNTS = ("visual_count_out", "text_count_out")
"""Outputs that the graph loses."""
_SIZE_ARITHMETIC = frozenset(
    (
        *("Add", "Sub", "Mul", "Div", "Mod", "Min", "Max", "Neg", "Cast"),
        *("Squeeze", "Unsqueeze", "Concat", "Reshape", "Gather", "Slice", "Identity"),
    )
)
_ON_HOST = {
    "Reshape": (1,),
    "Slice": (1, 2, 3, 4),
    "Range": (0, 1, 2),
    "ConstantOfShape": (0,),
    "Expand": (1,),
    "Unsqueeze": (1,),
    "Squeeze": (1,),
    "Pad": (1, 2, 3),
    "Tile": (1,),
    "Split": (1,),
    "TopK": (1,),
    "CumSum": (1,),
    "Trilu": (1,),
    "OneHot": (1,),
    **dict.fromkeys(("ReduceSum", "ReduceMean", "ReduceMax", "ReduceMin", "ReduceProd"), (1,)),
}
"""Inputs that kernels of the CUDA provider read in main memory."""


def use_operator(model: onnx.ModelProto) -> None:
    """Write a decoder graph for the custom operator, in place."""
    graph = model.graph
    _strip_functions(model)
    kept = [info for info in graph.output if info.name not in COUNTS]
    del graph.output[:]
    graph.output.extend(kept)
    prune(graph)
    _upload_sizes(model)
    fuse_norms(graph)


def _strip_functions(model: onnx.ModelProto) -> None:
    """The attention's nodes without functions; their outputs have no names where nothing reads them."""
    left = [function for function in model.functions if (function.domain, function.name) != ATTENTION]
    del model.functions[:]
    model.functions.extend(left)
    read = {name for node in model.graph.node for name in node.input} | {info.name for info in model.graph.output}
    for node in model.graph.node:
        if (node.domain, node.op_type) == ATTENTION:
            node.overload = ""
            node.output[:] = [name if name in read else "" for name in node.output]


def _upload_sizes(model: onnx.ModelProto) -> None:
    """Where a node of the GPU reads a size as data, a Range of one element brings it there."""
    graph = model.graph
    types = {info.name: info.type.tensor_type for info in onnx.shape_inference.infer_shapes(model).graph.value_info}
    reads = [(n, i) for n, i in data_sizes(Uses(graph)) if _is_one(types.get(graph.node[n].input[i]))]
    done, nodes = set[str](), list[onnx.NodeProto]()
    for n, node in enumerate(graph.node):
        for i in (i for reader, i in reads if reader == n):
            name = node.input[i]
            made = list(_upload(name, types[name]))
            nodes += [] if name in done else made
            done.add(name)
            node.input[i] = made[-1].output[0]
        nodes.append(node)
    del graph.node[:]
    graph.node.extend(nodes)


def data_sizes(uses: Uses) -> Iterator[tuple[int, int]]:
    """Numbers of nodes, and of their inputs, that read a size as data, on the GPU."""
    sizes = _sizes(uses)
    for n, node in enumerate(uses.graph.node):
        if not sizes.issuperset(filter(None, node.output)):
            for i, name in enumerate(node.input):
                if name in sizes and i not in _ON_HOST.get(node.op_type, ()):
                    yield n, i


def _sizes(uses: Uses) -> set[str]:
    """Values that are computed from shapes and constants alone."""
    found = set[str]()
    for node in uses.graph.node:
        names = set(filter(None, node.input))
        computed = node.op_type in _SIZE_ARITHMETIC and not names.isdisjoint(found)
        if node.op_type == "Shape" or (computed and all(x in found or x in uses.constants for x in names)):
            found.update(node.output)
    return found


def _is_one(given: Any) -> bool:
    """Whether a tensor has one element and at most one axis; None is one of unknown type."""
    if given is None:
        return False
    dims = given.shape.dim
    return given.HasField("shape") and all(dim.dim_value == 1 for dim in dims) and len(dims) <= 1


def _upload(name: str, given: Any) -> Iterator[onnx.NodeProto]:
    """Nodes whose last has the value, type and rank of a size, on the GPU."""
    own = f"{name}.on_gpu"
    dtype = helper.tensor_dtype_to_np_dtype(given.elem_type)
    one = numpy_helper.from_array(np.ones((), dtype))
    yield _node("Constant", (), f"{own}.one", value=one)
    scalar = name
    if given.shape.dim:
        scalar = f"{own}.scalar"
        yield _node("Squeeze", (name,), scalar)
    yield _node("Add", (scalar, f"{own}.one"), f"{own}.end")
    yield _node("Range", (scalar, f"{own}.end", f"{own}.one"), f"{own}.range")
    if not given.shape.dim:
        yield _node("Squeeze", (f"{own}.range",), own)


def _node(kind: str, inputs: Iterable[str], output: str, **attributes: Any) -> onnx.NodeProto:
    return helper.make_node(kind, list(inputs), [output], f"{kind}.{output}", **attributes)
