"""Traces the two graphs of a bundle and writes them, with references to weights and the operator's function."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import onnx
import onnx_ir as ir
from torch import Tensor

from vkvx.cache_layout import CacheLayout
from vkvx.errors import ModelError
from vkvx.export.options import ExportOptions
from vkvx.export.trace import IR_DTYPES, Traced, trace
from vkvx.export.weights import Place, load_tensor, match_parameters
from vkvx.graph_specs import decoder_inputs, decoder_outputs, vision_outputs
from vkvx.manifest import CalibrationInfo, Graph, ModelInfo, Progress, Quantization
from vkvx.models.checkpoint import StoredTensor, read_header
from vkvx.models.family import AttentionWeights, Source
from vkvx.models.graph.decoder import DecoderGraph
from vkvx.models.graph.metric import METRICS_FILE, compute_metrics, layer_rotary
from vkvx.models.graph.moments import read_checked
from vkvx.models.graph.skeleton import DTYPES, build_model, fake_weight
from vkvx.models.graph.vision import VisionGraph
from vkvx.plugins.function import attention_function
from vkvx.plugins.function.delta_rule import delta_rule_function
from vkvx.plugins.operator import DOMAIN, NAME, VERSION, OperatorAttributes, model_attributes

LOG = logging.getLogger("vkvx.export")
IR_VERSION = 10
"""The first that tells functions of one name apart by overload."""


@dataclass(frozen=True)
class Built:
    """A traced graph, its description for the manifest, and the stored tensor of each of its weights.

    ``metrics`` are initializers that no checkpoint holds, by the name of their tensor in ``METRICS_FILE``.
    """

    traced: Traced
    graph: Graph
    weights: dict[str, StoredTensor]
    metrics: dict[str, str]


@dataclass(frozen=True)
class BuiltModel:
    """All of a bundle but its files. ``weights`` are all that the model has, also those that no graph uses."""

    info: ModelInfo
    quantization: Quantization
    attributes: tuple[OperatorAttributes, ...]
    vision: Built
    decoder: Built
    weights: tuple[StoredTensor, ...]
    metrics: Callable[[], dict[str, Tensor]] | None
    """Computes the tensors of ``METRICS_FILE`` from the stored weights, one layer at a time."""
    calibration: CalibrationInfo | None
    """What else than the weights the metrics come from."""


def build(source: Source, stored: Mapping[str, StoredTensor], options: ExportOptions, report: Progress) -> BuiltModel:
    """Trace decoder and vision tower without touching a weight. Raises OptionError and ModelError."""
    family = source.family
    info = source.info(options.dtype)
    quantization = options.resolve(info.cached_layers, info.typical_tokens)
    attributes = model_attributes(CacheLayout(info, quantization))
    path = options.metrics_file
    moments = None if path is None else read_checked(path, info, source.config, LOG.warning)
    model = build_model(family.model_class(), source.config, options.dtype)
    found = match_parameters(model, stored)
    metrics: tuple[tuple[Tensor, Tensor], ...] = ()
    if attributes[0].needs_metrics:
        cached = (info.layers[i] for i in info.caches)
        sizes = [(one.kv_heads, one.head_dim, one.head_dim) for one in cached]
        weight = partial(fake_weight, model, dtype=DTYPES["float16"])
        metrics = tuple((weight(size), weight(size)) for size in sizes)
    report("decoder", 0, 1)
    layout = CacheLayout(info, quantization)
    inputs, outputs = decoder_inputs(layout), decoder_outputs(layout)
    graph = DecoderGraph(model, family, attributes, metrics)
    names = {
        id(parameter): f"{kind}.{layer}"
        for kind, parameters in (("key", graph.key_metrics), ("value", graph.value_metrics))
        for layer, parameter in zip(info.caches, parameters, strict=bool(metrics))
    }
    decoder = trace(
        graph,
        inputs,
        outputs,
        opset=options.opset,
        group_size=quantization.group_size,
    )
    report("decoder", 1, 1)
    report("vision", 0, 1)
    pixels = family.pixel_inputs(source.config)
    embeds = vision_outputs(info, family.pictures(source.config).rows)
    vision = trace(VisionGraph(model, family, DTYPES[options.dtype]), pixels, embeds, opset=options.opset)
    report("vision", 1, 1)

    def finish(name: str, traced: Traced, inputs: Any, outputs: Any) -> Built:
        weights, computed = {}, {}
        for weight, parameter in traced.parameters.items():
            if id(parameter) in names:
                computed[weight] = names[id(parameter)]
            else:
                weights[weight] = found[id(parameter)]
        return Built(traced, Graph(f"{name}.onnx", options.opset, inputs, outputs), weights, computed)

    def compute() -> dict[str, Tensor]:
        dtype = DTYPES[options.dtype]

        def load(parameter: Any) -> Any:
            return load_tensor(found[id(parameter)], dtype) if isinstance(parameter, Tensor) else parameter

        layers = (
            AttentionWeights(*(load(parameter) for parameter in vars(family.attention_weights(model, i)).values()))
            for i in info.caches
        )
        keys, values = compute_metrics(layers, layer_rotary(family, model), info, moments)
        named = (("key", keys), ("value", values))
        return {f"{kind}.{i}": t for kind, each in named for i, t in zip(info.caches, each, strict=True)}

    return BuiltModel(
        info,
        quantization,
        attributes,
        finish("vision", vision, pixels, embeds),
        finish("decoder", decoder, inputs, outputs),
        tuple(dict.fromkeys(found.values())),
        compute if metrics else None,
        None if moments is None else moments.calibration,
    )


def refer(built: Built, places: Mapping[StoredTensor, Place], dtype: str) -> None:
    """Make the weights of a graph point to their places."""
    for name, tensor in built.weights.items():
        place = places[tensor]
        built.traced.model.graph.initializers[name].const_value = ir.ExternalTensor(
            place.file, place.offset, place.length, IR_DTYPES[dtype], shape=ir.Shape(tensor.shape), name=name
        )


def write_metrics(model: BuiltModel, directory: Path) -> None:
    """Compute the metrics, write them to ``METRICS_FILE``, and make the decoder's initializers point to them."""
    if model.metrics is None:
        return
    from safetensors.torch import save

    path = directory / METRICS_FILE
    path.write_bytes(save(model.metrics()))
    stored = read_header(path)
    for name, tensor in ((name, stored[key]) for name, key in model.decoder.metrics.items()):
        model.decoder.traced.model.graph.initializers[name].const_value = ir.ExternalTensor(
            path.name, tensor.offset, tensor.length, ir.DataType.FLOAT16, shape=ir.Shape(tensor.shape), name=name
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
    """One function of standard ops for each kind of layer; points the decoder's nodes to them."""
    attributes, info = model.attributes, model.info
    layers = [info.layers[i] for i in info.attention_layers]
    kinds = [(entry, layer.kv_heads, layer.head_dim) for entry, layer in zip(attributes, layers, strict=True)]
    overloads: dict[tuple[OperatorAttributes, int, int], str] = {}
    for kind in dict.fromkeys(kinds):
        name = f"k{kind[0].key_bits}v{kind[0].value_bits}" + ("" if kind[0].keeps_text else f"t{kind[0].text_bits}")
        more = sum(other.partition("_")[0] == name for other in overloads.values())
        overloads[kind] = f"{name}_{more}" if more else name
    own = [node for node in built.traced.model.graph if node.domain == DOMAIN]
    nodes = [node for node in own if node.op_type == NAME]
    if len(nodes) != len(attributes):
        raise ModelError(f"the decoder has {len(nodes)} attention nodes in {len(attributes)} layers, expected one each")
    for node, kind in zip(nodes, kinds, strict=True):
        node.overload = overloads[kind]
    linear = [delta_rule_function(built.graph.opset)] if info.linear_layers else []
    return linear + [
        attention_function(
            entry,
            query_heads=info.query_heads,
            kv_heads=kv_heads,
            head_dim=head_dim,
            dtype=info.dtype,
            opset=built.graph.opset,
            overload=overload,
        )
        for (entry, kv_heads, head_dim), overload in overloads.items()
    ]
