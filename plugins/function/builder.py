"""A small builder of ONNX node lists: values are names, Python numbers and arrays become constants."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, TypeAlias

import numpy as np
import onnx
from onnx import helper, numpy_helper

Value: TypeAlias = str
Operand: TypeAlias = "Value | int | float | Sequence[int] | np.ndarray | np.generic"
Typed: TypeAlias = tuple[Value, int, int]
"""A value, its element type and rank."""

FLOAT = onnx.TensorProto.FLOAT
FLOAT16 = onnx.TensorProto.FLOAT16
INT32 = onnx.TensorProto.INT32
INT64 = onnx.TensorProto.INT64
UINT8 = onnx.TensorProto.UINT8
UINT32 = onnx.TensorProto.UINT32

_AXES_INPUT_SINCE = {"ReduceSum": 13, "ReduceMax": 18, "ReduceMin": 18, "ReduceSumSquare": 18}


class Builder:
    """Collects nodes in topological order.

    Operands are value names, or literals that become Constant nodes: int and lists of int as INT64, float as FP32,
    arrays as they are. Node and value names are ``scope/OpType_number``, the numbers being unique in the function.
    """

    def __init__(self, opset: int, parent: Builder | None = None) -> None:
        self.opset = opset
        self.nodes: list[onnx.NodeProto] = []
        self._scope: list[str] = parent._scope if parent else []
        self._numbers: list[int] = parent._numbers if parent else [0]
        self._constants: dict[tuple[str, tuple[int, ...], bytes], Value] = {}

    @contextmanager
    def scope(self, name: str) -> Iterator[None]:
        """Prefix the names of the nodes that are added inside."""
        self._scope.append(name)
        yield
        self._scope.pop()

    def _name(self, op_type: str) -> str:
        self._numbers[0] += 1
        return "/".join([*self._scope, f"{op_type}_{self._numbers[0]}"])

    def constant(self, operand: Operand) -> Value:
        """Name of a constant; equal constants of a graph share a node.

        A branch has constants of its own: onnxruntime does not share those of different layers that a subgraph uses,
        and then finds no common subexpressions either.
        """
        array = np.asarray(operand, np.float32 if isinstance(operand, float) else None)
        key = (array.dtype.str, array.shape, array.tobytes())
        if key in self._constants:
            return self._constants[key]
        name = self._name("Constant")
        self.nodes.append(helper.make_node("Constant", [], [name], name, value=numpy_helper.from_array(array)))
        self._constants[key] = name
        return name

    def add(self, op_type: str, operands: Sequence[Operand], outputs: Sequence[str], **attributes: Any) -> None:
        """Append a node with outputs of given names."""
        inputs = [x if isinstance(x, str) else self.constant(x) for x in operands]
        self.nodes.append(helper.make_node(op_type, inputs, list(outputs), outputs[0], **attributes))

    def op(self, op_type: str, *operands: Operand, **attributes: Any) -> Value:
        """Append a node with one output and return its name."""
        name = self._name(op_type)
        self.add(op_type, operands, [name], **attributes)
        return name

    def cast(self, x: Value, to: int) -> Value:
        """Convert to an ONNX element type."""
        return self.op("Cast", x, to=to)

    def reduce(self, op_type: str, x: Value, axis: int, keepdims: bool = True) -> Value:
        """ReduceSum, ReduceMax, ReduceMin or ReduceSumSquare over one axis, in the opset's form."""
        if self.opset >= _AXES_INPUT_SINCE[op_type]:
            return self.op(op_type, x, [axis], keepdims=int(keepdims))
        return self.op(op_type, x, axes=[axis], keepdims=int(keepdims))

    def top_k(self, x: Value, k: Operand, axis: int, largest: bool) -> Value:
        """The k largest or smallest entries along an axis, that one first; k is [1] INT64."""
        values = self._name("TopK")
        self.add("TopK", [x, k], [values, f"{values}_indices"], axis=axis, largest=int(largest))
        return values

    def unsqueeze(self, x: Value, *axes: int) -> Value:
        """Insert axes of size 1."""
        return self.op("Unsqueeze", x, list(axes))

    def reshape(self, x: Value, shape: Sequence[int] | Value) -> Value:
        """Reshape; 0 keeps a dimension, -1 infers one."""
        return self.op("Reshape", x, shape if isinstance(shape, str) else list(shape))

    def transpose(self, x: Value, *perm: int) -> Value:
        """Permute axes."""
        return self.op("Transpose", x, perm=list(perm))

    def size(self, x: Value, axis: int) -> Value:
        """One dimension of a value, INT64 scalar. (Gather: TensorRT 8.6 ignores the start and end of Shape.)"""
        return self.op("Gather", self.op("Shape", x), axis)

    def arange(self, limit: Operand) -> Value:
        """0, 1, ... limit - 1, INT64."""
        return self.op("Range", 0, limit, 1)

    def head(self, x: Value, length: Value, axis: int) -> Value:
        """The first ``length`` (INT64 scalar) entries along an axis."""
        return self.op("Slice", x, [0], self.unsqueeze(length, 0), [axis])

    def tail(self, x: Value, start: Value, axis: int) -> Value:
        """The entries from ``start`` (INT64 scalar) on along an axis."""
        return self.op("Slice", x, self.unsqueeze(start, 0), [np.iinfo(np.int64).max], [axis])

    def gather_flat(self, x: Value, places: Value, tail: Sequence[int]) -> Value:
        """Entries [..., *tail] at ``places`` [...] of a value whose last axes are ``tail``, the others made one.

        What is not gathered is not read: the Reshape is a view.
        """
        return self.op("Gather", self.reshape(x, [-1, *tail]), places, axis=0)

    def matmul_transposed(self, a: Value, b: Value, rank: int) -> Value:
        """a @ b^T over the last two axes of values of one rank; onnxruntime fuses the two nodes, no copy is made."""
        return self.op("MatMul", a, self.transpose(b, *range(rank - 2), rank - 1, rank - 2))

    def branch(self) -> Builder:
        """A builder for a branch of an If or the body of a Scan: it sees the values of this one."""
        return Builder(self.opset, self)

    def graph(self, name: str, outputs: Sequence[Typed], inputs: Sequence[Typed] = ()) -> onnx.GraphProto:
        """The nodes as a subgraph."""

        def infos(values: Sequence[Typed]) -> list[onnx.ValueInfoProto]:
            return [helper.make_tensor_value_info(v, dtype, [None] * rank) for v, dtype, rank in values]

        return helper.make_graph(self.nodes, name, infos(inputs), infos(outputs))

    def scan(
        self,
        name: str,
        state: Typed,
        sequences: Mapping[str, Typed],
        body: Callable[[Builder, Value, dict[str, Value]], list[Typed]],
    ) -> list[Value]:
        """A Scan with one state over the first axis of ``sequences``.

        ``body`` adds the nodes of one step to a builder, from the state and the step's entry of each sequence, and
        returns the new state and what to collect along a new first axis. The result is the last state and these.
        """
        inner = self.branch()
        with self.scope(name):
            names = {key: inner._name(key) for key in ("state", *sequences)}
            step = [(names[key], dtype, rank - 1) for key, (_, dtype, rank) in sequences.items()]
            outputs = body(inner, names["state"], {key: names[key] for key in sequences})
            graph = inner.graph(name, outputs, [(names["state"], *state[1:]), *step])
            results = [self._name("Scan") for _ in outputs]
        operands = [state[0], *(value for value, _, _ in sequences.values())]
        self.add("Scan", operands, results, body=graph, num_scan_inputs=len(sequences))
        return results
