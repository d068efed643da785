"""From a legalised graph to a serialised engine."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from vkvx.errors import BuildError
from vkvx.manifest import Graph
from vkvx.plugins.operator import NAME
from vkvx.runtime.engines.gpus import Gpu, use_gpu
from vkvx.runtime.engines.library import TensorRTLibrary
from vkvx.runtime.engines.log import Log
from vkvx.runtime.engines.manifest import Profile
from vkvx.runtime.engines.progress import BuildProgress, monitor, run_cancellable


@dataclass(frozen=True)
class Network:
    """A parsed graph. The parser holds weights that the network refers to, so the two live and end together."""

    definition: Any
    parser: Any
    plugin_layers: int

    @property
    def layers(self) -> int:
        """Layers before fusion."""
        return int(self.definition.num_layers)


def parse(library: TensorRTLibrary, builder: Any, log: Log, graph: bytes, path: Path) -> Network:
    """Parse a graph, whose external weights lie beside ``path``. Raises BuildError that names the node."""
    module = library.module
    flags = module.NetworkDefinitionCreationFlag
    # From TensorRT 11 on there may be no other networks, and no flag.
    flag = getattr(flags, "STRONGLY_TYPED" if library.is_strongly_typed else "EXPLICIT_BATCH", None)
    network = builder.create_network(0 if flag is None else 1 << int(flag))
    parser = module.OnnxParser(network, log.logger)
    log.errors.clear()
    if not parser.parse(graph, str(path.resolve())):
        errors = [parser.get_error(i) for i in range(parser.num_errors)]
        raise BuildError(explain_parser_errors(library.name, path.name, errors, log.reason))
    layers = [network.get_layer(i) for i in range(network.num_layers)]
    if not library.is_strongly_typed:
        _set_precisions(library, layers, _value_types(graph))
    plugins = {getattr(module.LayerType, name, None) for name in ("PLUGIN_V2", "PLUGIN_V3")} - {None}
    return Network(network, parser, sum(layer.type in plugins for layer in layers))


def explain_parser_errors(name: str, file: str, errors: Iterable[Any], logged: str) -> str:
    """One line: the node that TensorRT does not take, its words, and what to do."""
    errors = list(errors)
    if not errors:
        return f"{name} cannot read {file}: {logged}; export the model again"
    error = errors[0]
    text = " ".join(str(error.desc()).split())
    node = str(error.node_name()) if hasattr(error, "node_name") else f"number {error.node()}"
    operator = str(error.node_operator()) if hasattr(error, "node_operator") else ""
    where = f"node {node} ({operator})" if operator else f"node {node}"
    more = f" (and {len(errors) - 1} more)" if len(errors) > 1 else ""
    what = f"does not take {where} of {file}{more}" if node else f"cannot read {file}"
    return f"{name} {what}: {text}; {_remedy(operator, text)}"


def _remedy(operator: str, text: str) -> str:
    if operator == NAME or "plugin" in text.lower():
        return "run `vkvx plugin build` for the plugin of this version, or give --plugin-free"
    if re.search(r"bfloat16|BF16|kBF16", text):
        return "export the model with --dtype float16"
    if re.search(r"initializer|No such file", text):
        return "copy the bundle again: a file of weights is missing or damaged"
    return "export the model again with --opset 17, or install another version of TensorRT"


def _value_types(graph: bytes) -> dict[str, str]:
    """The float types that a serialised graph gives its values, by their names: "float32" or "float16"."""
    import onnx

    inferred = onnx.shape_inference.infer_shapes(onnx.load_from_string(graph)).graph
    names = {onnx.TensorProto.FLOAT: "float32", onnx.TensorProto.FLOAT16: "float16"}
    values = [*inferred.value_info, *inferred.input, *inferred.output]
    types = {value.name: value.type.tensor_type.elem_type for value in values}
    return {name: names[number] for name, number in types.items() if number in names}


def _set_precisions(library: TensorRTLibrary, layers: Iterable[Any], types: Mapping[str, str]) -> None:
    """Let layers of a weakly typed network compute in the types that the graph gives their results.

    The parser of such a network takes all that is computed for FP32. Then TensorRT would choose between FP32 and FP16
    for norms and logits, and for the plugin: in FP32 it would copy the FP16 caches back and forth.
    """
    module = library.module
    skipped = {getattr(module.LayerType, name, None) for name in ("CONSTANT", "SHAPE", "CAST")}
    for layer in layers:
        if layer.type in skipped or not layer.num_outputs:
            continue
        dtypes = [types.get(layer.get_output(i).name) for i in range(layer.num_outputs)]
        if dtypes[0] is None:  # INT32, or a layer that the parser has added
            continue
        layer.precision = library.precision(dtypes[0])
        for i, dtype in enumerate(dtypes):
            if dtype is not None:
                layer.set_output_type(i, library.precision(dtype))


def check_tensors(library: TensorRTLibrary, network: Network, graph: Graph) -> None:
    """Raise BuildError unless the network has the inputs and outputs of the bundle's graph, and their types."""
    definition = network.definition
    found = {
        "input": [definition.get_input(i) for i in range(definition.num_inputs)],
        "output": [definition.get_output(i) for i in range(definition.num_outputs)],
    }
    for kind, specs in (("input", graph.inputs), ("output", graph.outputs)):
        tensors = {tensor.name: tensor for tensor in found[kind]}
        if set(tensors) != {spec.name for spec in specs}:
            extra = set(tensors) ^ {spec.name for spec in specs}
            raise BuildError(
                f"{graph.file}: the {kind}s {sorted(extra)} are not those of vkvx.json; export the model again"
            )
        for spec in specs:
            tensor = tensors[spec.name]
            if tensor.dtype != library.precision(spec.dtype):
                raise BuildError(
                    f"{graph.file}: TensorRT makes {spec.name} {tensor.dtype}, vkvx.json says {spec.dtype}; "
                    "export the model again"
                )
            if getattr(tensor, "is_shape_tensor", False):
                raise BuildError(
                    f"{graph.file}: sizes depend on the values of {spec.name}, but TensorRT must know them ahead of a "
                    "call; export the model again"
                )


def add_profile(builder: Any, config: Any, profile: Profile) -> None:
    """Add an optimisation profile. Raises BuildError if TensorRT refuses it."""
    added = builder.create_optimization_profile()
    for name, shapes in profile.shapes.items():
        added.set_shape(name, *shapes)
    if config.add_optimization_profile(added) != profile.index:
        raise BuildError(f"TensorRT refuses the profile {profile.name}; give other limits, such as --max-input-len")


def build_engine(
    library: TensorRTLibrary,
    builder: Any,
    log: Log,
    network: Network,
    config: Any,
    path: Path,
    progress: BuildProgress,
    gpu: Gpu | None = None,
) -> None:
    """Build the engine into a file, on ``gpu`` where there are several kinds.

    Raises BuildError; KeyboardInterrupt once TensorRT has stopped, after Ctrl-C.
    """
    watch = monitor(library.module, progress)
    if watch is not None:
        config.progress_monitor = watch
    log.errors.clear()

    def cancel() -> None:
        progress.cancelled = True

    def work() -> bool:
        if gpu is not None:  # the thread that builds is a new one
            use_gpu(gpu)
        return _serialize(library, builder, network.definition, config, file)

    with path.open("wb") as file:
        if not run_cancellable(work, cancel):
            remedy = "give --debug for its log"
            if re.search(r"memory|workspace|allocat", log.reason, re.IGNORECASE):
                remedy = "free memory, give a larger --workspace, or lower limits such as --max-input-len"
            raise BuildError(f"{library.name} cannot build the engine: {log.reason}; {remedy}")
    progress.done()


def _serialize(library: TensorRTLibrary, builder: Any, definition: Any, config: Any, file: BinaryIO) -> bool:
    """Build, and write piece by piece where TensorRT can: the engine is never in memory as a whole then."""
    if not library.writes_streams:
        engine = builder.build_serialized_network(definition, config)
        if engine is not None:
            file.write(memoryview(engine))
        return engine is not None
    errors: list[OSError] = []

    base = library.module.IStreamWriter

    class Writer(base):  # type: ignore[misc,valid-type]
        def __init__(self) -> None:
            base.__init__(self)

        def write(self, data: bytes) -> int:
            try:
                return file.write(data)
            except OSError as error:  # must not go through TensorRT
                errors.append(error)
                return 0

    done = bool(builder.build_serialized_network_to_stream(definition, config, Writer()))
    if errors:
        raise errors[0]
    return done
