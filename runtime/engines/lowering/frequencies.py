"""Frequencies of rotary embeddings, as sums of two numbers that FP16 holds."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import onnx_ir as ir
from onnx_ir.passes import InPlacePass, PassResult, PostconditionError


class SplitFrequencies(InPlacePass):
    """Rewrites ``positions * frequencies``, whose sine or cosine is taken, as ``positions * high + positions * low``.

    TensorRT 8.6 may keep FP32 constants in FP16, whatever the precision of the layer that reads them. A frequency is
    then off by up to 1 in 2,048, an angle at position 600 by up to 0.3. ``high`` and ``low`` lose nothing in FP16, and
    their sum has 22 bits.
    """

    def call(self, model: ir.Model) -> PassResult:
        """See the class."""
        products = list(_products(model))
        for product, place in products:
            positions, frequencies = product.inputs[1 - place], product.inputs[place]
            assert positions is not None
            assert frequencies is not None
            values = ir.convenience.get_const_tensor(frequencies).numpy()
            high = values.astype(np.float16).astype(np.float32)
            low = (values - high).astype(np.float16).astype(np.float32)
            nodes = [ir.node("Constant", [], {"value": ir.tensor(part)}) for part in (high, low)]
            nodes += [ir.node("Mul", [positions, part.outputs[0]]) for part in list(nodes)]
            nodes.append(ir.node("Add", [nodes[2].outputs[0], nodes[3].outputs[0]]))
            assert product.graph is not None
            ir.convenience.replace_nodes_and_values(
                product.graph, product, [product], nodes, product.outputs, nodes[-1].outputs
            )
        return PassResult(model, bool(products))

    def ensures(self, model: ir.Model) -> None:
        """What is left loses nothing in FP16."""
        for product, _ in _products(model):
            raise PostconditionError(f"{product.name} multiplies by frequencies that FP16 does not hold")


def _products(model: ir.Model) -> Iterator[tuple[ir.Node, int]]:
    """Each Mul of which a Sin or Cos is taken, with the place of a constant factor that FP16 does not hold."""
    seen: set[ir.Node] = set()
    for node in model.graph:
        if node.op_type in ("Sin", "Cos") and node.inputs[0] is not None:
            for product in _sources(node.inputs[0]):
                place = next((i for i, value in enumerate(product.inputs) if _is_rounded(value)), None)
                if place is not None and product not in seen:
                    seen.add(product)
                    yield product, place


def _sources(value: ir.Value) -> Iterator[ir.Node]:
    """Products that a value holds the results of, side by side or in another shape."""
    node = value.producer()
    if node is None:
        return
    if node.op_type == "Mul":
        yield node
    elif node.op_type in ("Concat", "Add", "Reshape", "Transpose", "Unsqueeze"):
        for source in node.inputs[: None if node.op_type in ("Concat", "Add") else 1]:
            if source is not None:
                yield from _sources(source)


def _is_rounded(value: ir.Value | None) -> bool:
    tensor = None if value is None else ir.convenience.get_const_tensor(value)
    if tensor is None or tensor.dtype != ir.DataType.FLOAT:
        return False
    values = tensor.numpy()
    return not np.array_equal(values, values.astype(np.float16).astype(np.float32))
