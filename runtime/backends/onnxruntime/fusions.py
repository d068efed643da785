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
MOST_SIZES = 16
"""Elements of a constant that is looked at."""


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
        for node in nodes:
            if node.op_type == "Constant" and node.attribute[0].name == "value":
                self.constants[node.output[0]] = numpy_helper.to_array(node.attribute[0].t)

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
