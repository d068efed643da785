"""From a torch module to an ONNX graph, without the weights: shapes are checked, constants folded, traces removed."""

from __future__ import annotations

import logging
import re
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from inspect import Parameter, signature
from typing import Any

import onnx_ir as ir
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

from vkvx.errors import ModelError, VkvxError
from vkvx.manifest import TensorSpec, parse_dim
from vkvx.models.graph.skeleton import DTYPES
from vkvx.opset import lower_opset
from vkvx.plugins import (
    operator,
    torch_delta_rule,  # noqa: F401 (registers the operator)
    torch_op,  # noqa: F401
)
from vkvx.plugins.schema import delta_rule_schema, operator_schema

IR_DTYPES = {
    "float16": ir.DataType.FLOAT16,
    "bfloat16": ir.DataType.BFLOAT16,
    "float32": ir.DataType.FLOAT,
    "int32": ir.DataType.INT32,
}
NATIVE_OPSET = 18
"""What the exporter writes itself; others are converted."""
_REFUSED = {"NonZero", "If", "Loop", "Scan", "SequenceConstruct", "SequenceAt", "ConcatFromSequence", "Unique"}


@dataclass(frozen=True)
class Traced:
    """A graph without weights. ``parameters`` holds the parameter that each weight initializer stands for."""

    model: ir.Model
    parameters: dict[str, nn.Parameter]


def trace(
    module: nn.Module,
    inputs: Sequence[TensorSpec],
    outputs: Sequence[TensorSpec],
    *,
    opset: int,
    group_size: int = 1,
) -> Traced:
    """Export ``module``, whose weights may be fake, to ONNX with exactly these inputs and outputs.

    Symbols in the shapes become dynamic dimensions; ModelError if the graph fixes one. ``group_size`` divides Nv.
    """
    mode = next((p.fake_mode for p in module.parameters() if isinstance(p, FakeTensor)), FakeTensorMode())
    sizes, dims = _symbols(inputs, group_size)
    shapes = [{axis: dims[d] for axis, d in enumerate(spec.shape) if isinstance(d, str)} for spec in inputs]
    positional = [p for p in signature(module.forward).parameters.values() if p.kind is not Parameter.VAR_POSITIONAL]
    fixed = len(positional)
    nested = (*shapes[:fixed], tuple(shapes[fixed:])) if len(inputs) > fixed else tuple(shapes)
    with torch.no_grad(), mode:
        example = tuple(
            torch.zeros([sizes[d] if isinstance(d, str) else d for d in spec.shape], dtype=DTYPES[spec.dtype])
            for spec in inputs
        )
        with _quiet(), _export_errors(module):
            program = torch.onnx.export(
                torch.export.export(module, example, dynamic_shapes=nested, strict=False),
                dynamo=True,
                opset_version=max(opset, NATIVE_OPSET),
                input_names=[spec.name for spec in inputs],
                output_names=[spec.name for spec in outputs],
                custom_translation_table={
                    torch.ops.vkvx.visual_kv_attention.default: partial(_emit, operator_schema()),
                    torch.ops.vkvx.gated_delta_rule.default: partial(_emit, delta_rule_schema()),
                },
                optimize=False,
                verbose=False,
            )
    assert program is not None
    model = program.model
    parameters = dict(module.named_parameters(remove_duplicate=False))
    weights = [value for name, value in model.graph.initializers.items() if name in parameters]
    _simplify(model, weights)
    if opset < NATIVE_OPSET:
        lower_opset(model)
    _name_dims(model.graph, inputs)
    _declare(model.graph.inputs, inputs)
    _declare(model.graph.outputs, outputs)
    _check_nodes(model)
    return Traced(model, {value.name: parameters[value.name] for value in weights if value.uses()})


def _emit(schema: Any, *tensors: ir.Value | None, **attributes: int | float | str) -> Sequence[ir.Value]:
    """Translation of a torch op: one node, which has no inputs in place of those that it does without."""
    from onnxscript import values

    domain = values.Opset(operator.DOMAIN, operator.VERSION)
    return values.Op(domain, schema.name, schema)(*(x for x in tensors if x is not None), **attributes)


def _symbols(inputs: Sequence[TensorSpec], group_size: int) -> tuple[dict[str, int], dict[str, Any]]:
    """An example size and a torch dimension for each symbol. Sizes of 0 and 1 would be taken as fixed."""
    found = sorted({dim for spec in inputs for dim in spec.shape if isinstance(dim, str)})
    symbols = sorted({parse_dim(dim)[1] for dim in found})
    values = {symbol: 2 * i + 3 for i, symbol in enumerate(symbols)}
    named = {symbol: torch.export.Dim(symbol) for symbol in symbols}
    sizes, dims = dict[str, int](), dict[str, Any]()
    for dim in found:
        factor, symbol = parse_dim(dim)
        sizes[dim], dims[dim] = factor * values[symbol], named[symbol] if factor == 1 else factor * named[symbol]
    if "Nv" in sizes:
        sizes["Nv"] *= group_size
        dims["Nv"] = group_size * torch.export.Dim("call_groups")
    return sizes, dims


def _simplify(model: ir.Model, weights: Sequence[ir.Value]) -> None:
    """Fold constants and drop what has no effect, never looking into weights: they are inputs meanwhile."""
    from onnxscript import optimizer

    graph = model.graph
    for value in weights:
        value.const_value = None
        del graph.initializers[value.name]
        graph.inputs.append(value)
    optimizer.optimize_ir(model, onnx_shape_inference=False)
    del graph.inputs[len(graph.inputs) - len(weights) :]
    for value in weights:
        if value.uses():
            graph.initializers.add(value)
    for node in ir.traversal.RecursiveGraphIterator(graph):
        node.metadata_props.clear()
        node.doc_string = None
        for value in node.outputs:
            value.metadata_props.clear()
    model.metadata_props.clear()
    graph.metadata_props.clear()


def _name_dims(graph: ir.Graph, inputs: Sequence[TensorSpec]) -> None:
    """Write the dimensions of all values in terms of the inputs' symbols (``S + 1``) in place of torch's names."""
    names: dict[str, str] = {}
    for value, spec in zip(graph.inputs, inputs, strict=True):
        for given, name in zip(value.shape or (), spec.shape, strict=True):
            if isinstance(given, ir.SymbolicDim) and isinstance(name, str) and given.value is not None:
                factor, symbol = parse_dim(given.value)
                known, own = parse_dim(name)
                names[symbol] = own if factor == known else f"({own}/{factor})"
    pattern = re.compile(r"\bs\d+\b")
    for node in graph:
        for value in node.outputs:
            if value.shape is not None:
                value.shape = ir.Shape(
                    pattern.sub(lambda match: names.get(match[0], match[0]), dim.value)
                    if isinstance(dim, ir.SymbolicDim) and dim.value is not None
                    else dim
                    for dim in value.shape
                )


def _declare(values: Sequence[ir.Value], specs: Sequence[TensorSpec]) -> None:
    """Check dtypes and shapes against ``specs`` and give the dynamic dimensions their names."""
    if [value.name for value in values] != [spec.name for spec in specs]:
        raise ModelError(f"the graph has {[value.name for value in values]}, expected {[spec.name for spec in specs]}")
    for value, spec in zip(values, specs, strict=True):
        given = list(value.shape or ())
        fits = value.dtype == IR_DTYPES[spec.dtype] and len(given) == len(spec.shape)
        for dim, expected in zip(given, spec.shape, strict=False):
            fits = fits and (isinstance(dim, ir.SymbolicDim) if isinstance(expected, str) else dim == expected)
        if not fits:
            raise ModelError(
                f"the exporter made {spec.name} {value.dtype} {given}, expected {spec.dtype} {list(spec.shape)}; "
                "this version of torch is not supported"
            )
        value.shape = ir.Shape(spec.shape)


def _check_nodes(model: ir.Model) -> None:
    """Refuse control flow, sizes that depend on values, and foreign operators.

    TensorRT takes NonZero, If, Loop and Scan, with limits. But no model here needs them: all sizes follow from those
    of the inputs, so that an engine can know them ahead of a call.
    """
    for node in ir.traversal.RecursiveGraphIterator(model.graph):
        if node.op_type in _REFUSED or (node.domain not in ("", operator.DOMAIN)):
            raise ModelError(
                f"the exporter made a node {node.domain}::{node.op_type}, which graphs of a bundle may not have"
            )


@contextmanager
def _export_errors(module: nn.Module) -> Iterator[None]:
    """Turn what torch says about a model that it cannot export, or only for fixed sizes, into one line."""
    try:
        yield
    except VkvxError:
        raise
    except Exception as error:  # torch has dozens of exception types for this
        reason = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
        raise ModelError(
            f"torch {torch.__version__} cannot export {type(module).__name__}: {reason}; "
            "--debug shows where, and constraints.txt the versions that are known to work"
        ) from error


@contextmanager
def _quiet() -> Iterator[None]:
    """Silence what the exporter says about packages that are not needed and about its own internals."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)
