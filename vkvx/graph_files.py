"""Reads the ONNX files of a bundle without their weights, and holds them against the manifest.

Needs the package onnx, which is imported where it is used.
"""

from __future__ import annotations

import math
import reprlib
from collections.abc import Iterator, Sequence
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

from vkvx.graph_specs import TensorSpec, difference
from vkvx.packages import missing

if TYPE_CHECKING:
    from vkvx.manifest import Manifest

MOST_BYTES = 1 << 29
"""Of an ONNX file without its weights; a protobuf has less than 2 GiB, and takes a multiple of its size in memory."""
MOST_DEPTH = 16
"""Of graphs in nodes of graphs; those of an export have none."""
_DTYPES = {1: "float32", 6: "int32", 10: "float16", 16: "bfloat16"}
"""By number in TensorProto.DataType: what inputs and outputs may be."""


def read_graph(bundle: Path, manifest: Manifest, name: str) -> Any:
    """The ModelProto of a graph, once inputs, outputs and places of weights are known to be those of the manifest.

    Raises BundleError with the first that is not; DependencyError without onnx.
    """
    try:
        import onnx
    except ImportError as error:
        raise missing("onnx", error) from error
    graph, kind = manifest.graphs[name], manifest.kind
    path = bundle / graph.file
    if manifest.files[graph.file].bytes > MOST_BYTES:
        raise kind.error(f"{path} is larger than a graph without weights, {MOST_BYTES} bytes; {kind.again}")
    try:
        model = onnx.load(str(path), load_external_data=False)
    except Exception as error:  # protobuf raises a type of its own
        raise kind.error(f"{path} is not a readable ONNX file ({reprlib.repr(str(error))}); {kind.again}") from error
    if not all(isinstance(name, str) for name in _names(model)):  # protobuf gives bytes where it is no UTF-8
        raise kind.error(f"{path} holds names that are no text; {kind.copy}")
    inputs = [_spec(info) for info in model.graph.input]
    known = {dim for spec in inputs for dim in spec.shape if isinstance(dim, str)}
    outputs = [_spec(info) for info in model.graph.output]
    sides = (
        ("inputs", inputs, graph.inputs),
        ("outputs", _named(outputs, graph.outputs, known), graph.outputs),
    )
    for side, given, expected in sides:
        if words := difference(given, expected):
            raise kind.error(f"{path}: its {side} are not those of {kind.file}: {words}; {kind.copy}")
    for tensor in _tensors(model):
        if tensor.data_location == onnx.TensorProto.EXTERNAL and (words := _misplaced(tensor, manifest, graph.file)):
            raise kind.error(f"{path}: the weight {reprlib.repr(tensor.name)} {words}; do not trust this bundle")
    return model


def _names(model: Any) -> Iterator[Any]:
    """What of a model is called by a name and shown: domains, operators, functions, ends, places of weights."""
    yield from (entry.domain for entry in model.opset_import)
    for function in model.functions:
        yield from (function.domain, function.name, function.overload)
    for body in (model.graph, *model.functions):
        for node in body.node:
            yield from (node.domain, node.op_type, node.overload)
    for info in (*model.graph.input, *model.graph.output):
        yield info.name
        yield from (dim.dim_param for dim in info.type.tensor_type.shape.dim)
    for tensor in _tensors(model):
        yield tensor.name
        for entry in tensor.external_data:
            yield from (entry.key, entry.value)


def _spec(info: Any) -> TensorSpec:
    """An input or output as the file declares it; what no manifest can say is ``?``."""
    tensor = info.type.tensor_type
    dims = (dim.dim_value if dim.HasField("dim_value") else dim.dim_param or "?" for dim in tensor.shape.dim)
    return TensorSpec(info.name, _DTYPES.get(tensor.elem_type, f"type {tensor.elem_type}"), tuple(dims))


def _named(given: Sequence[TensorSpec], expected: Sequence[TensorSpec], known: set[str]) -> list[TensorSpec]:
    """Outputs of a file in the words of the manifest where the file names a size that no input has.

    Such a name says nothing; graphs of the first format have it for the number of visual tokens.
    """

    def word(dim: int | str, wanted: int | str) -> int | str:
        says_nothing = isinstance(dim, str) and isinstance(wanted, str) and "*" not in dim and dim not in {*known, "?"}
        return wanted if says_nothing else dim

    return [
        TensorSpec(spec.name, spec.dtype, tuple(map(word, spec.shape, wanted.shape)))
        if len(spec.shape) == len(wanted.shape)
        else spec
        for spec, wanted in zip(given, expected, strict=False)
    ] + list(given[len(expected) :])


def _tensors(model: Any) -> Iterator[Any]:
    """Every tensor of a model: initializers, and attributes of nodes, also those of functions and of inner graphs."""
    bodies = [(body, 0) for body in (model.graph, *model.functions)]
    while bodies:
        body, depth = bodies.pop()
        yield from getattr(body, "initializer", ())
        for sparse in getattr(body, "sparse_initializer", ()):
            yield from (sparse.values, sparse.indices)
        for node in body.node:
            for attribute in node.attribute:
                yield from (attribute.t, *attribute.tensors) if attribute.HasField("t") else attribute.tensors
                inner = (attribute.g, *attribute.graphs) if attribute.HasField("g") else attribute.graphs
                bodies += [(graph, depth + 1) for graph in inner if depth < MOST_DEPTH]


def _misplaced(tensor: Any, manifest: Manifest, file: str) -> str | None:
    """What is wrong with the place of a weight: it has to lie in a file of the bundle, with as many bytes as it has."""
    from onnx.helper import tensor_dtype_to_np_dtype

    where = {entry.key: entry.value for entry in tensor.external_data}
    location = str(PurePosixPath(file).parent / where.get("location", ""))
    if where.get("location", "").startswith("/") or location not in manifest.files:
        return f"lies in {reprlib.repr(where.get('location'))}, which is no file of the bundle"
    try:
        count = math.prod(tensor.dims) * tensor_dtype_to_np_dtype(tensor.data_type).itemsize
        offset, length = (int(where.get(key, default)) for key, default in (("offset", 0), ("length", count)))
    except (KeyError, ValueError, TypeError):
        return "has no type or no place"
    size = manifest.files[location].bytes
    if min(tensor.dims, default=0) < 0 or length != count or not 0 <= offset <= size - length:
        return f"takes {count} bytes, not {length} at {offset} of the {size} of {location}"
    return None
