"""A float32 copy of a bfloat16 graph, for execution providers without bfloat16 kernels.

Every bfloat16 type in the graph becomes float32; the weights are widened, which is exact, and kept in memory. Results
are those of float32 arithmetic on bfloat16 weights.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from vkvx.runtime.backends.onnxruntime.overloads import separate


def widen(model: Any, folder: Path) -> dict[str, np.ndarray]:
    """Put float32 in place of bfloat16 in an ONNX ModelProto, whose weights lie in files of ``folder``.

    Returns its initializers in external files, by name, to be handed to onnxruntime as external initializers.
    """
    import onnx

    values: dict[str, np.ndarray] = {}
    for tensor in model.graph.initializer:
        if tensor.data_location == onnx.TensorProto.EXTERNAL:
            values[tensor.name] = _read(tensor, folder, onnx)
    graphs = [model.graph]
    for body in (model.graph, *model.functions):
        _widen_infos(body.value_info, onnx)
        for node in _nodes(body):
            _widen_attributes(node, onnx)
            graphs += [attribute.g for attribute in node.attribute if attribute.HasField("g")]
    for graph in graphs:
        for infos in (graph.input, graph.output, graph.value_info):
            _widen_infos(infos, onnx)
        for tensor in graph.initializer:
            _widen_tensor(tensor, onnx)
    separate(model)
    return values


def _read(tensor: Any, folder: Path, onnx: Any) -> np.ndarray:
    """An external tensor; bfloat16 as float32, anything else as it is."""
    where = {entry.key: entry.value for entry in tensor.external_data}
    wide = tensor.data_type == onnx.TensorProto.BFLOAT16
    dtype = np.dtype(np.uint16) if wide else onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type)
    shape = tuple(tensor.dims)
    offset = int(where.get("offset", 0))
    count = int(np.prod(shape))
    values = np.fromfile(folder / where["location"], dtype, count, offset=offset).reshape(shape)
    return _to_float32(values) if wide else values


def _to_float32(words: np.ndarray) -> np.ndarray:
    """Bfloat16 values, given as UINT16, are the upper halves of float32 values."""
    wide = words.astype(np.uint32)
    wide <<= 16
    return wide.view(np.float32)


def _widen_tensor(tensor: Any, onnx: Any) -> None:
    if tensor.data_type != onnx.TensorProto.BFLOAT16:
        return
    if tensor.data_location != onnx.TensorProto.EXTERNAL:
        words = np.frombuffer(tensor.raw_data, np.uint16) if tensor.raw_data else np.array(tensor.int32_data, np.uint16)
        tensor.ClearField("int32_data")
        tensor.raw_data = _to_float32(words).tobytes()
    tensor.data_type = onnx.TensorProto.FLOAT


def _widen_infos(infos: Any, onnx: Any) -> None:
    for info in infos:
        if info.type.tensor_type.elem_type == onnx.TensorProto.BFLOAT16:
            info.type.tensor_type.elem_type = onnx.TensorProto.FLOAT


def _widen_attributes(node: Any, onnx: Any) -> None:
    for attribute in node.attribute:
        if attribute.name in ("to", "dtype") and attribute.i == onnx.TensorProto.BFLOAT16:
            attribute.i = onnx.TensorProto.FLOAT
        elif attribute.type == onnx.AttributeProto.TENSOR:
            _widen_tensor(attribute.t, onnx)


def _nodes(graph: Any) -> Iterator[Any]:
    """Nodes of a graph or function and of the graphs inside them."""
    for node in graph.node:
        yield node
        for attribute in node.attribute:
            if attribute.HasField("g"):
                yield from _nodes(attribute.g)
