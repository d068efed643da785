"""The TensorRT plugins without a GPU: what they export, what creators and registries make of them, what they refuse."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from plugin_calls import FIELD_TYPES, TYPES, Builds, Creator, Desc, Node, run

from vkvx.plugins import build
from vkvx.plugins.library import KernelLibrary, Params
from vkvx.plugins.operator import INPUTS, OUTPUTS, OperatorAttributes, TensorDefinition

INTERFACES = [3, 2]
SIZES = {"B": 2, "Bc": 3, "Hq": 4, "Hkv": 2, "S": 300, "D": 64, "Nv": 256, "Nt": 40, "G": 2, "N": 50}


def shape_of(tensor: TensorDefinition, attributes: OperatorAttributes, **sizes: int) -> list[int]:
    """The tensor's shape for these sizes, by the symbols of the operator's table."""
    known = SIZES | sizes
    if not attributes.is_packed:
        known |= {"G": 0, "bk": 1, "bv": 1}
    else:
        known |= {"bk": attributes.key_bits, "bv": attributes.value_bits}
    known |= {"C/128": known["G"] * attributes.group_size // 128, "D/32": known["D"] // 32}
    known["D/4+1"] = known["D"] // 4 + 1
    return [known[symbol] if symbol in known else int(symbol) for symbol in tensor.shape]


def descs(attributes: OperatorAttributes, model: str = "float16", **sizes: int) -> tuple[list[Desc], list[Desc]]:
    """Descriptions of inputs and outputs."""
    lists = (
        [Desc.of(shape_of(t, attributes, **sizes), model if t.dtype == "T" else t.dtype) for t in tensors]
        for tensors in (attributes.inputs, outputs_of(attributes))
    )
    inputs, outputs = lists
    return inputs, outputs


def outputs_of(attributes: OperatorAttributes) -> list[TensorDefinition]:
    """A cache output is as the input of its name."""
    inputs = {definition.name: definition for definition in attributes.inputs}
    return [inputs.get(definition.name, definition) for definition in OUTPUTS]


@pytest.fixture(scope="module", params=INTERFACES, ids=["v3", "v2"])
def creator(request: pytest.FixtureRequest, plugin_builds: Builds) -> Creator:
    return Creator(plugin_builds, request.param)


def make(creator: Creator, **values: object) -> tuple[OperatorAttributes, Node]:
    """A node of 128-token groups, through all its fields."""
    attributes = OperatorAttributes(**values)  # type: ignore[arg-type]
    node = creator.create(attributes.to_dict())
    assert node is not None, creator.messages()
    return attributes, node


@pytest.mark.parametrize("interface", INTERFACES)
def test_exports_and_needs(plugin_builds: Builds, interface: int) -> None:
    """Two symbols and the C interface out, none of TensorRT or a CUDA library in: it loads in any process."""
    path = plugin_builds.plugin(interface)
    listed = subprocess.run(["nm", "-D", str(path)], capture_output=True, text=True, check=True).stdout.splitlines()
    symbols = [line.split() for line in listed]
    defined = {words[2] for words in symbols if len(words) == 3 and words[1] != "w"}
    own = {"getCreators" if interface == 3 else "getPluginCreators", "setLoggerFinder"}
    assert {name for name in defined if not name.startswith("vkvx_")} == own
    assert "vkvx_sample" in defined
    undefined = {words[1] for words in symbols if len(words) == 2}
    assert not [name for name in undefined if "nvinfer" in name or name.startswith(("cu", "vkvx"))]
    needed = subprocess.run(["readelf", "-d", str(path)], capture_output=True, text=True, check=True).stdout
    assert "NEEDED" in needed
    assert not any(name in needed for name in ("nvinfer", "tensorrt_rtx", "cudart"))
    KernelLibrary(path)


def test_fields_are_the_table(creator: Creator) -> None:
    fields, table = creator.field_names(), OperatorAttributes().to_dict()
    if not creator.has_aliases:  # IPluginV2DynamicExt, for networks in which TensorRT chooses types
        assert fields.pop("model_dtype") == (FIELD_TYPES[str], "")
    assert list(fields) == list(table)
    for name, default in table.items():
        kind, value = fields[name]
        assert kind == FIELD_TYPES[type(default)], name
        assert value == (pytest.approx(default) if isinstance(default, float) else default), name


def test_missing_fields_have_their_defaults(creator: Creator) -> None:
    node = creator.create({"key_bits": 2, "value_bits": 2})
    assert node is not None
    inputs, outputs = descs(OperatorAttributes(key_bits=2, value_bits=2))
    assert node.configure(inputs, outputs) == 0


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"key_bits": 3}, "key_bits is 3; give 1, 2, 4 or 8"),
        ({"key_bits": 16}, "key_bits is 16"),
        ({"value_bits": 0}, "value_bits is 0"),
        ({"group_size": 100}, "group_size is 100; give a positive multiple of 128"),
        ({"quantizer": "shape"}, "quantizer is 'shape'; give one of minmax, quantile, shrink, lloyd, shaped"),
        ({"score_correction": ""}, "score_correction is ''; give one of none, affine, expected"),
        ({"quantile_alpha_key": 0.5}, "quantile_alpha_key is 0.5.*; give at least 0 and less than 0.5"),
        ({"shrink_value": 0.0}, "shrink_value is 0.0.*; give more than 0 and at most 1"),
        ({"tau": -1.0}, "tau is -1.0.*; give at least 0"),
        ({"correction_limit": float("nan")}, "correction_limit is nan; give more than 0"),
        ({"scale": float("inf")}, "scale must be finite"),
        ({"softcap": -1.0}, "softcap is -1.0.*; give at least 0"),
        ({"sliding_window": -5}, "sliding_window is -5; give at least 0"),
        ({"text_bits": 4}, "text_bits is 4; give 16 or 8"),
        ({"text_bits": 8, "key_bits": 16, "value_bits": 16}, "text_bits is 8; give 16 where key_bits is"),
        ({"key_bits": 1.0}, "field 'key_bits' has type 1 and length 1; expected one INT32"),
        ({"tau": 3}, "field 'tau' has type 5 and length 1; expected one FLOAT32"),
        ({"quantizer": 3}, "field 'quantizer' .* expected text"),
        ({"bits": 1}, "field 'bits' is not known"),
        ({"model_dtype": "half"}, "model_dtype is 'half'; give one of float16, bfloat16, float32"),
    ],
)
def test_fields_that_are_refused(creator: Creator, values: dict[str, object], words: str) -> None:
    assert creator.create(values, "model.layers.7") is None
    message = creator.messages()
    assert re.search(words, message), message
    assert "VisualKVAttention 'model.layers.7': " in message


def test_types_and_formats(creator: Creator) -> None:
    """Only the types of the table, T the same everywhere, only the linear format."""
    for quantizer, model, text_bits in (("lloyd", "float16", 8), ("shaped", "bfloat16", 8), ("shaped", "float32", 16)):
        attributes, node = make(creator, quantizer=quantizer, text_bits=text_bits)
        tables = (*attributes.inputs, *outputs_of(attributes))
        inputs, outputs = descs(attributes, model)
        right = [*inputs, *outputs]
        for position, definition in enumerate(tables):
            assert node.supports(position, right), definition.name
            for name in TYPES:
                wrong = list(right)
                wrong[position] = Desc.of(shape_of(definition, attributes), name)
                same = name == (model if definition.dtype == "T" else definition.dtype)
                allowed = name in ("float16", "bfloat16", "float32") if position == 0 else same
                assert node.supports(position, wrong) == allowed, (definition.name, name)
            wrong[position] = Desc.of(shape_of(definition, attributes), right_type(definition, model), form=2)
            assert not node.supports(position, wrong), definition.name
        types = [right_type(definition, model) for definition in attributes.inputs]
        for output, definition in enumerate(outputs_of(attributes)):
            assert node.output_type(output, types) == TYPES[right_type(definition, model)]


@pytest.mark.parametrize("chosen", ["float16", "float32"])
def test_a_node_that_keeps_to_one_type(creator: Creator, chosen: str) -> None:
    """Where TensorRT may choose, the field ``model_dtype`` leaves it one type, in the engine as well."""
    attributes = OperatorAttributes(quantizer="shaped")
    node = creator.create({**attributes.to_dict(), "model_dtype": chosen})
    assert node is not None, creator.messages()
    for kept in (node, node.through_engine()):
        for model in ("float16", "bfloat16", "float32"):
            inputs, outputs = descs(attributes, model)
            tensors = [*inputs, *outputs]
            for position, definition in enumerate((*attributes.inputs, *OUTPUTS)):
                expected = definition.dtype != "T" or model == chosen
                assert kept.supports(position, tensors) == expected, (definition.name, model)


def right_type(definition: TensorDefinition, model: str) -> str:
    return model if definition.dtype == "T" else definition.dtype


def test_aliases(creator: Creator) -> None:
    """A cache output shares the memory of the input of its name."""
    if not creator.has_aliases:
        pytest.skip("IPluginV2DynamicExt declares none")
    _, node = make(creator)
    names = [definition.name for definition in INPUTS]
    expected = [names.index(definition.name) if definition.name in names else -1 for definition in OUTPUTS]
    assert [node.alias(output) for output in range(len(OUTPUTS))] == expected
    assert node.alias(7) == node.alias(-1) == -1


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"D": 100}, "head_dim is 100; give a multiple of 32"),
        ({"Hq": 3}, "query_heads is 3; give a multiple of kv_heads"),
        ({"Nv": 7}, "visual_entries is 7; give a multiple of group_size"),
    ],
)
def test_profiles_that_no_call_has(creator: Creator, changes: dict[str, int], words: str) -> None:
    attributes, node = make(creator)
    assert node.workspace(*descs(attributes, **changes)) == 0
    assert words in creator.messages()


def test_another_number_of_inputs(creator: Creator) -> None:
    plain, shaped = OperatorAttributes(), OperatorAttributes(quantizer="shaped")
    _, node = make(creator)
    assert node.workspace(*descs(shaped)) == 0
    assert "the node has 17 inputs and 7 outputs; expected 14 and 7" in creator.messages()
    node = creator.create(shaped.to_dict())
    assert node is not None
    assert node.workspace(*descs(plain)) == 0
    assert "the node has 14 inputs and 7 outputs; expected 17 and 7" in creator.messages()


@pytest.mark.parametrize("name", [definition.name for definition in OperatorAttributes(quantizer="shaped").inputs])
def test_shapes_that_do_not_agree(creator: Creator, name: str) -> None:
    """enqueue names the tensor that has another shape or type than the others ask for."""
    attributes, node = make(creator, quantizer="shaped")
    inputs, outputs = descs(attributes)
    node.workspace(inputs, outputs)
    names = [definition.name for definition in attributes.inputs]
    at, pointers = names.index(name), [256] * 17
    definition = attributes.inputs[at]
    shape = shape_of(definition, attributes)
    for axis in range(len(shape)):
        if (name, definition.shape[axis]) in FREE:
            continue
        wrong = list(inputs)
        wrong[at] = Desc.of([n + 128 * (i == axis) for i, n in enumerate(shape)], right_type(definition, "float16"))
        assert node.enqueue(wrong, outputs, pointers, pointers[:7], 256) != 0
        message = creator.messages()
        assert "expected" in message or "; give" in message, (axis, message)
    wrong[at] = Desc.of([*shape, 1], right_type(definition, "float16"))
    assert node.enqueue(wrong, outputs, pointers, pointers[:7], 256) != 0
    assert f"{name} has {len(shape) + 1} dimensions; expected {len(shape)}" in creator.messages()
    wrong[at] = Desc.of(shape, "int8")
    assert node.enqueue(wrong, outputs, pointers, pointers[:7], 256) != 0
    assert f"{name} has a type or format that is not supported" in creator.messages()


FREE = {("query", "Hq"), ("visual_index", "Nv"), ("text_index", "Nt")}
"""Sizes that one tensor alone has."""


def test_without_a_device_a_call_is_refused(creator: Creator) -> None:
    if shutil.which("nvidia-smi"):
        pytest.skip("there is a device")
    attributes, node = make(creator)
    inputs, outputs = descs(attributes)
    assert node.workspace(inputs, outputs) > 0
    stored = node.through_engine()
    assert stored.enqueue(inputs, outputs, [256] * 14, [256] * 7, 256) != 0
    assert "VisualKVAttention 'layer in an engine': no CUDA device is current" in creator.messages()
    stored.destroy()


@pytest.mark.parametrize("namespace", ["", "vkvx"])
def test_the_registry_of_tensorrt_for_rtx(plugin_builds: Builds, namespace: str) -> None:
    """The registry that engines ask: it finds the creator in both namespaces, and what it makes works."""
    creator = Creator(plugin_builds, 3, registry=True, namespace=namespace)
    assert list(creator.field_names()) == list(OperatorAttributes().to_dict())
    attributes, node = make(creator, key_bits=4, value_bits=4, quantizer="shaped", scale=0.125)
    inputs, outputs = descs(attributes)
    assert node.configure(inputs, outputs) == 0
    assert node.through_engine().workspace(inputs, outputs) == node.workspace(inputs, outputs) > 0
    assert creator.create({"key_bits": 3}) is None


def test_messages_reach_the_logger_of_tensorrt_for_rtx(plugin_builds: Builds) -> None:
    pytest.importorskip("tensorrt_rtx", reason="needs the package tensorrt-rtx-cu13")
    program = """
import sys
import tensorrt_rtx as trt

class Logger(trt.ILogger):
    def __init__(self):
        trt.ILogger.__init__(self)
    def log(self, severity, message):
        if severity == trt.ILogger.ERROR:
            print(message)

builder = trt.Builder(Logger())
registry = trt.get_plugin_registry()
handle = registry.load_library(sys.argv[1])
creator = registry.get_creator("VisualKVAttention", "1", "vkvx")
fields = [trt.PluginField("quantizer", b"best", trt.PluginFieldType.CHAR)]
print(creator.create_plugin("model.layers.7", trt.PluginFieldCollection(fields), trt.TensorRTPhase.BUILD))
del creator
registry.deregister_library(handle)
print(registry.get_creator("VisualKVAttention", "1", "vkvx"))
"""
    command = [sys.executable, "-c", program, str(plugin_builds.plugin(3))]
    printed = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
    expected = "VisualKVAttention 'model.layers.7': quantizer is 'best'; give one of minmax, quantile, shrink, lloyd"
    assert any(line.startswith(expected) for line in printed)
    assert printed.count("None") == 2  # no plugin, then no creator


def test_workspace_is_that_of_the_library(creator: Creator, plugin_builds: Builds, kernel_build: Path) -> None:
    library = KernelLibrary(kernel_build / build.LIBRARY)
    for values in ({}, {"key_bits": 16, "value_bits": 16}, {"score_correction": "affine", "quantizer": "shaped"}):
        attributes, node = make(creator, **values)
        inputs, outputs = descs(attributes)
        params = Params(
            rows=SIZES["B"], positions=SIZES["S"], slots=SIZES["Bc"], query_heads=SIZES["Hq"], kv_heads=SIZES["Hkv"],
            head_dim=SIZES["D"], group_size=128, visual_capacity=256 if attributes.is_packed else 0,
            text_capacity=SIZES["N"], visual_entries=SIZES["Nv"], text_entries=SIZES["Nt"],
            key_bits=attributes.key_bits, value_bits=attributes.value_bits,
            correction=2 if attributes.score_correction == "expected" else 1, tau=3.0, correction_limit=3.0, scale=1.0,
            text_bits=16,
        )  # fmt: skip
        bound = library.workspace_bound(params)
        assert bound <= node.workspace(inputs, outputs) <= bound + 1024


def test_bound_of_the_workspace_covers_all_devices_and_smaller_calls(tmp_path: Path) -> None:
    """The host code that sizes the workspace, with random calls and numbers of multiprocessors."""
    if shutil.which("nvcc") is None:
        pytest.skip("needs nvcc")
    source = Path(__file__).parents[1] / "helpers" / "workspace_bound.cu"
    run(["nvcc", "-std=c++17", "-arch=sm_90", f"-I{build.SOURCES}", str(source), "-o", str(tmp_path / "bound")])
    run([str(tmp_path / "bound")])
