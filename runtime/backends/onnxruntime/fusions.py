"""Nodes of a decoder graph that onnxruntime has one kernel for, where standard operators take many.

A pattern that is not met exactly stays as it is.
"""

from __future__ import annotations

import math
from collections import defaultdict
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx
from onnx import helper, numpy_helper

from vkvx.plugins import operator

ATTENTION = operator.DOMAIN, operator.NAME
MICROSOFT = "com.microsoft"
"""The domain of onnxruntime's own operators."""
MOST_SIZES = 16
"""Elements of a constant that is looked at."""
_PARAMS = 7  # the input visual_key_params, whose last axis is D


@dataclass
class Uses:
    """Who makes and who reads the values of a graph, and its constants that lie in the file itself."""

    graph: onnx.GraphProto
    makers: dict[str, onnx.NodeProto] = field(init=False)
    readers: dict[str, list[onnx.NodeProto]] = field(init=False)
    constants: dict[str, np.ndarray] = field(init=False)
    initializers: dict[str, onnx.TensorProto] = field(init=False)

    def __post_init__(self) -> None:
        nodes = self.graph.node
        self.makers = {name: node for node in nodes for name in node.output if name}
        self.readers = defaultdict(list)
        for node in nodes:
            for name in node.input:
                self.readers[name].append(node)
        self.initializers = {tensor.name: tensor for tensor in self.graph.initializer}
        self.constants = {
            name: numpy_helper.to_array(tensor)
            for name, tensor in self.initializers.items()
            if tensor.data_location != onnx.TensorProto.EXTERNAL and math.prod(tensor.dims) <= MOST_SIZES
        }

    def number(self, name: str) -> float | None:
        """The value of a constant of one element."""
        array = self.constants.get(name)
        return float(array.ravel()[0]) if array is not None and array.size == 1 else None

    def maker(self, name: str, kind: str) -> Any:
        """The node that makes a value, if it is of a kind, else None."""
        node = self.makers.get(name)
        return node if node is not None and node.op_type == kind and not node.domain else None

    def only_reader(self, name: str, kind: str) -> Any:
        """The node that reads a value, if it is the only one, and of a kind, else None."""
        nodes = self.readers[name]
        is_output = any(info.name == name for info in self.graph.output)
        return nodes[0] if len(nodes) == 1 and nodes[0].op_type == kind and not is_output else None


def prune(graph: onnx.GraphProto) -> None:
    """Drop nodes that nothing depends on, and weights that no node reads."""
    wanted, kept = {info.name for info in graph.output}, list[onnx.NodeProto]()
    for node in reversed(graph.node):
        if wanted.isdisjoint(filter(None, node.output)):
            continue
        kept.append(node)
        wanted |= _read_by(node)
    del graph.node[:]
    graph.node.extend(reversed(kept))
    weights = [tensor for tensor in graph.initializer if tensor.name in wanted]
    del graph.initializer[:]
    graph.initializer.extend(weights)


def _read_by(node: onnx.NodeProto) -> set[str]:
    """Names that a node reads, those that graphs inside of it take from outside included."""
    names = set(node.input)
    for attribute in node.attribute:
        for graph in (attribute.g, *attribute.graphs):
            for inner in graph.node:
                names |= _read_by(inner)
    return names


def fuse_norms(graph: onnx.GraphProto) -> None:
    """``weight * (x / sqrt(mean(x^2) + epsilon))`` as the one node that onnxruntime has for it."""
    uses = Uses(graph)
    fused = {}
    for node in graph.node:
        if node.op_type == "Reciprocal" and (found := _norm(uses, node)) is not None:
            last, norm = found
            fused[last.output[0]] = norm
    _replace(graph, fused)


def _norm(uses: Uses, reciprocal: onnx.NodeProto) -> tuple[onnx.NodeProto, onnx.NodeProto] | None:
    """The last node of a norm, and what takes its place; None where the nodes around are others."""
    root = uses.maker(reciprocal.input[0], "Sqrt")
    shifted = root and uses.maker(root.input[0], "Add")
    mean = shifted and uses.maker(shifted.input[0], "ReduceMean")
    power = mean and uses.maker(mean.input[0], "Pow")
    if power is None or uses.number(power.input[1]) != 2 or not _is_over_last_axis(uses, mean):
        return None
    epsilon, wide = uses.number(shifted.input[1]), power.input[0]
    scaled = uses.only_reader(reciprocal.output[0], "Mul")
    if epsilon is None or scaled is None or sorted(scaled.input) != sorted((wide, reciprocal.output[0])):
        return None
    cast, narrow = uses.maker(wide, "Cast"), uses.only_reader(scaled.output[0], "Cast")
    source, normed = (cast.input[0], narrow.output[0]) if cast and narrow else (wide, scaled.output[0])
    last = uses.only_reader(normed, "Mul")
    weight = last and next((name for name in last.input if name in uses.initializers), None)
    if last is None or weight is None or len(uses.initializers[weight].dims) != 1:
        return None
    norm = helper.make_node(
        "SimplifiedLayerNormalization",
        [source, weight],
        [last.output[0]],
        f"norm.{last.output[0]}",
        axis=-1,
        epsilon=epsilon,
        stash_type=onnx.TensorProto.FLOAT,
    )
    return last, norm


def _is_over_last_axis(uses: Uses, mean: Any) -> bool:
    given = {attribute.name: attribute for attribute in mean.attribute}
    axes = list(given["axes"].ints) if "axes" in given else uses.constants.get(mean.input[1], np.zeros(0)).tolist()
    return axes == [-1] and ("keepdims" not in given or given["keepdims"].i == 1)


def _replace(graph: onnx.GraphProto, fused: dict[str, onnx.NodeProto]) -> None:
    """Put nodes in place of those that make the outputs of these names; what led to them goes with :func:`prune`."""
    nodes = [fused.get(node.output[0], node) for node in graph.node]
    del graph.node[:]
    graph.node.extend(nodes)
    prune(graph)


def fuse_rotations(graph: onnx.GraphProto) -> bool:
    """``x * cos + rotate_half(x) * sin`` before the attention as one node of ``MICROSOFT``; whether any was found."""
    uses = Uses(graph)
    widths = {info.name: info.type.tensor_type.shape.dim[-1].dim_value for info in graph.input if _axes(info)}
    fused, tables = dict[str, onnx.NodeProto](), dict[str, list[onnx.NodeProto]]()
    for node in graph.node:
        if (node.domain, node.op_type) == ATTENTION:
            for name in node.input[:2]:
                if (found := _rotation(uses, name, widths[node.input[_PARAMS]] // 2)) is not None:
                    source, cos, sin, half = found
                    for table in (cos, sin):
                        tables.setdefault(table, _table(table, half))
                    inputs = [source, _POSITIONS, *(f"{table}.rows" for table in (cos, sin))]
                    fused[name] = helper.make_node(
                        "RotaryEmbedding", inputs, [name], f"rotary.{name}", domain=MICROSOFT
                    )
    if fused:
        _insert(graph, uses, {**tables, graph.input[0].name: list(_positions())})
        _replace(graph, fused)
    return bool(fused)


_POSITIONS = "rotary.positions"


def _rotation(uses: Uses, name: str, half: int) -> tuple[str, str, str, int] | None:
    """What is rotated, its cosines and sines [B, S, D], and half of D; None where the nodes around are others."""
    total = uses.maker(name, "Add")
    products = [product and uses.maker(product, "Mul") for product in (total.input if total else ())]
    if len(products) != 2 or None in products:
        return None
    plain, turned = products
    joined: Any = next((node for x in turned.input if (node := uses.maker(x, "Concat")) is not None), None)
    negative = joined and len(joined.input) == 2 and uses.maker(joined.input[0], "Neg")
    parts = negative and [uses.maker(x, "Slice") for x in (negative.input[0], joined.input[1])]
    if not parts or None in parts:
        return None
    source = parts[0].input[0]
    wanted = ((half, None), (0, half))
    if source not in plain.input or any(
        part.input[0] != source or not _takes(uses, part, *ends) for part, ends in zip(parts, wanted, strict=True)
    ):
        return None
    cos, sin = _angles(uses, plain, source, "Cos"), _angles(uses, turned, joined.output[0], "Sin")
    return None if cos is None or sin is None else (source, cos, sin, half)


def _takes(uses: Uses, node: onnx.NodeProto, start: int, end: int | None) -> bool:
    """Whether a Slice takes these entries of the last of four axes."""
    first, last, axis = (uses.number(name) for name in node.input[1:4])
    ends = last == end if end is not None else last is not None and last > 1 << 30
    return first == start and ends and axis in (3, -1) and (len(node.input) < 5 or uses.number(node.input[4]) == 1)


def _angles(uses: Uses, product: onnx.NodeProto, other: str, kind: str) -> str | None:
    """The cosines or sines [B, S, D] of a product, whose halves are alike."""
    name = next((name for name in product.input if name != other), "")
    spread = uses.maker(name, "Unsqueeze")
    if spread is None or uses.number(spread.input[1]) != 1:
        return None
    table = spread.input[0]
    cast = uses.maker(table, "Cast")
    made = uses.maker(cast.input[0] if cast else table, kind)
    doubled = made and uses.maker(made.input[0], "Concat")
    return table if doubled and len(doubled.input) == 2 and doubled.input[0] == doubled.input[1] else None


def _table(name: str, half: int) -> list[onnx.NodeProto]:
    """Cosines or sines [B, S, D] as rows [B * S, D/2]."""
    numbers = {"start": [0], "end": [half], "axis": [2], "shape": [-1, half]}
    constants = [
        helper.make_node("Constant", [], [f"{name}.{k}"], f"{name}.{k}", value=numpy_helper.from_array(np.array(v)))
        for k, v in numbers.items()
    ]
    ends = [f"{name}.{k}" for k in ("start", "end", "axis")]
    return [
        *constants,
        helper.make_node("Slice", [name, *ends], [f"{name}.half"], f"{name}.half"),
        helper.make_node("Reshape", [f"{name}.half", f"{name}.shape"], [f"{name}.rows"], f"{name}.rows"),
    ]


def _positions() -> Any:
    """Rows of the tables [B, S]: each position has its own."""
    for k, value in (("zero", 0), ("one", 1)):
        constant = numpy_helper.from_array(np.array(value))
        yield helper.make_node("Constant", [], [f"rotary.{k}"], f"rotary.{k}", value=constant)
    yield helper.make_node("Size", ["input_ids"], ["rotary.size"], "rotary.size")
    yield helper.make_node("Shape", ["input_ids"], ["rotary.shape"], "rotary.shape")
    yield helper.make_node("Range", ["rotary.zero", "rotary.size", "rotary.one"], ["rotary.range"], "rotary.range")
    yield helper.make_node("Reshape", ["rotary.range", "rotary.shape"], [_POSITIONS], _POSITIONS)


def _insert(graph: onnx.GraphProto, uses: Uses, behind: dict[str, list[onnx.NodeProto]]) -> None:
    """Put nodes behind the ones that make the values of these names; those of inputs come first."""
    nodes = [new for name, made in behind.items() if name not in uses.makers for new in made]
    for node in graph.node:
        nodes.append(node)
        nodes += [new for name in node.output for new in behind.get(name, ())]
    del graph.node[:]
    graph.node.extend(nodes)


def _axes(info: Any) -> int:
    return len(info.type.tensor_type.shape.dim)
