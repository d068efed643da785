"""Traces the two graphs of a bundle and writes them, with references to weights and the operator's function."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx
import onnx_ir as ir

from vkvx.errors import ModelError
from vkvx.export.decoder import DecoderGraph, decoder_inputs, decoder_outputs
from vkvx.export.function import attention_function
from vkvx.export.graph import DTYPES, IR_DTYPES, Traced, build_model, trace
from vkvx.export.operator import DOMAIN, VERSION, OperatorAttributes
from vkvx.export.options import ExportOptions, layer_attributes
from vkvx.export.vision import VisionGraph, vision_outputs
from vkvx.export.weights import Place, match_parameters
from vkvx.manifest import Graph, ModelInfo, Progress, Quantization
from vkvx.models.adapter import Source
from vkvx.models.checkpoint import StoredTensor

IR_VERSION = 10
"""The first that tells functions of one name apart by overload."""


@dataclass(frozen=True)
class Built:
    """A traced graph, its description for the manifest, and the stored tensor of each of its weights."""

    traced: Traced
    graph: Graph
    weights: dict[str, StoredTensor]


@dataclass(frozen=True)
class BuiltModel:
    """All of a bundle but its files."""

    info: ModelInfo
    quantization: Quantization
    attributes: tuple[OperatorAttributes, ...]
    vision: Built
    decoder: Built


def build(source: Source, stored: Mapping[str, StoredTensor], options: ExportOptions, report: Progress) -> BuiltModel:
    """Trace decoder and vision tower without touching a weight. Raises OptionError and ModelError."""
    adapter = source.adapter
    info = adapter.info(source, options.dtype)
    quantization = options.resolve(info.layers, info.tokens_per_picture)
    attributes = layer_attributes(quantization, info.head_dim**-0.5)
    model = build_model(adapter.model_class(), source.config, options.dtype)
    found = match_parameters(model, stored)
    report("decoder", 0, 1)
    inputs, outputs = decoder_inputs(info, quantization), decoder_outputs(info, quantization)
    decoder = trace(
        DecoderGraph(model, adapter.text_model(model), adapter.head(model), attributes),
        inputs,
        outputs,
        opset=options.opset,
        group_size=quantization.group_size,
    )
    report("decoder", 1, 1)
    report("vision", 0, 1)
    pixels, embeds = adapter.pixel_inputs(source.config), vision_outputs(info)
    vision = trace(VisionGraph(model, adapter, DTYPES[options.dtype]), pixels, embeds, opset=options.opset)
    report("vision", 1, 1)

    def finish(name: str, traced: Traced, inputs: Any, outputs: Any) -> Built:
        weights = {weight: found[id(parameter)] for weight, parameter in traced.parameters.items()}
        return Built(traced, Graph(f"{name}.onnx", options.opset, inputs, outputs), weights)

    return BuiltModel(
        info,
        quantization,
        attributes,
        finish("vision", vision, pixels, embeds),
        finish("decoder", decoder, inputs, outputs),
    )


def refer(built: Built, places: Mapping[StoredTensor, Place], dtype: str) -> None:
    """Make the weights of a graph point to their places."""
    for name, tensor in built.weights.items():
        place = places[tensor]
        built.traced.model.graph.initializers[name].const_value = ir.ExternalTensor(
            place.file, place.offset, place.length, IR_DTYPES[dtype], shape=ir.Shape(tensor.shape), name=name
        )


def write_graph(model: ir.Model, path: Path, functions: Sequence[onnx.FunctionProto] = ()) -> None:
    """Serialise a graph; its weights stay where they are referred to."""
    model.ir_version = max(IR_VERSION, model.ir_version)
    proto = ir.to_proto(model)
    proto.functions.extend(functions)
    if functions and not any(entry.domain == DOMAIN for entry in proto.opset_import):
        proto.opset_import.add(domain=DOMAIN, version=VERSION)
    proto.producer_name, proto.producer_version = "vkvx", ""
    with path.open("xb") as file:
        file.write(proto.SerializeToString(deterministic=True))


def operator_functions(built: Built, model: BuiltModel) -> list[onnx.FunctionProto]:
    """One function of standard ops for each distinct set of attributes; points the decoder's nodes to them."""
    attributes, info = model.attributes, model.info
    overloads = {entry: f"k{entry.key_bits}v{entry.value_bits}" for entry in attributes}
    nodes = [node for node in built.traced.model.graph if node.domain == DOMAIN]
    if len(nodes) != len(attributes):
        raise ModelError(f"the decoder has {len(nodes)} attention nodes in {len(attributes)} layers, expected one each")
    for node, entry in zip(nodes, attributes, strict=True):
        node.overload = overloads[entry]
    return [
        attention_function(
            entry,
            query_heads=info.query_heads,
            kv_heads=info.kv_heads,
            head_dim=info.head_dim,
            dtype=info.dtype,
            opset=built.graph.opset,
            overload=overload,
        )
        for entry, overload in overloads.items()
    ]
