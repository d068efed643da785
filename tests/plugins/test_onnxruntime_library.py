"""The custom operator of onnxruntime: run on a CPU by a stub of libvkvx, whose calls the torch reference answers."""

from __future__ import annotations

import ctypes
import os
import re
import subprocess
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from function_calls import model_for
from onnxruntime_calls import SOURCES, Reference
from operator_cases import CACHES, Arrays, Dims, attributes_for, empty_state, new_call, same_bits
from oracle import Attributes
from plugin_calls import run
from torch_calls import arrays, run_op, tensors

from vkvx.plugins import build
from vkvx.plugins.library import Params
from vkvx.plugins.operator import OperatorAttributes

DIMS = Dims(slots=3, groups=2, text_rows=100, float_type="float16")


def bare_model(attributes: Attributes, dims: Dims = DIMS) -> onnx.ModelProto:
    """One node without the operator's function."""
    model = model_for(attributes, dims)
    del model.functions[:]
    model.graph.node[0].overload = ""
    return model


def open_session(model: onnx.ModelProto, library: Path) -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    options.register_custom_ops_library(str(library))
    options.log_severity_level = 4
    return onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])


def call_for(attributes: Attributes, seed: int = 3) -> Arrays:
    rng = np.random.default_rng(seed)
    state = empty_state(DIMS, attributes, rng)
    return new_call([(2, "t3 p90 t1"), (-1, "t1"), (0, "t2")], state, DIMS, attributes, rng)


CASES = [
    attributes_for(1, 1),
    attributes_for(4, 2, quantizer="shaped", softcap=3.0),
    attributes_for(8, 8, sliding_window=4),
    attributes_for(2, 2, quantizer="shaped", sliding_window=4, visual_mask="run"),
    attributes_for(1, 1, text_bits=8),
    attributes_for(16, 16),
]


@pytest.mark.parametrize("attributes", CASES, ids=lambda a: f"k{a.key_bits}-{a.quantizer}-t{a.text_bits}")
@pytest.mark.parametrize("in_place", [True, False])
def test_a_node_is_one_call(onnxruntime_stub: Path, attributes: Attributes, in_place: bool) -> None:
    """Every field of the params is that of the torch op's call; caches are updated where they are bound."""
    session, inputs = open_session(bare_model(attributes), onnxruntime_stub), call_for(attributes)
    reference = Reference(onnxruntime_stub, [OperatorAttributes(**asdict(attributes))])
    expected = arrays(run_op(tensors(inputs, DIMS.float_type), attributes))
    buffers = {name: x.copy() for name, x in inputs.items()}
    values = {name: onnxruntime.OrtValue.ortvalue_from_numpy(x) for name, x in buffers.items()}
    binding = session.io_binding()
    for name, value in values.items():
        binding.bind_ortvalue_input(name, value)
    for output in session.get_outputs():
        name = output.name.removeprefix("present_")
        if in_place and name in CACHES:
            binding.bind_ortvalue_output(output.name, values[name])
        else:
            binding.bind_output(output.name, "cpu")
    session.run_with_iobinding(binding)
    assert reference.failure is None
    ((params, appends),) = reference.calls
    assert appends
    named = tensors(inputs, DIMS.float_type)
    wanted = Params.of(named, OperatorAttributes(**asdict(attributes)), torch.empty_like(named["query"]))
    for name, kind in Params._fields_:
        given, want = getattr(params, name), getattr(wanted, name)
        if name.endswith("_stride"):
            assert list(given) == list(want), name
        elif kind is not ctypes.c_void_p and name != "workspace_bytes":
            assert given == want, name
    for output, result in zip(session.get_outputs(), binding.copy_outputs_to_cpu(), strict=True):
        assert same_bits(result, expected[output.name.removeprefix("present_")]), output.name
    for name, x in buffers.items():
        changed = in_place and name in CACHES
        assert same_bits(x, expected[name] if changed else inputs[name]), name


def test_outputs_that_nothing_reads(onnxruntime_stub: Path) -> None:
    """A layer that reads another one's cache: attention alone."""
    attributes = attributes_for(1, 1)
    model, inputs = bare_model(attributes), call_for(attributes)
    model.graph.node[0].output[1:] = [""] * len(CACHES)
    del model.graph.output[1:]
    reference = Reference(onnxruntime_stub, [OperatorAttributes(**asdict(attributes))])
    (output,) = open_session(model, onnxruntime_stub).run(None, inputs)
    assert reference.failure is None
    assert [appends for _, appends in reference.calls] == [False]
    assert same_bits(output, arrays(run_op(tensors(inputs, DIMS.float_type), attributes))["output"])


def test_shapes_of_outputs_are_known(onnxruntime_stub: Path) -> None:
    """Types and shapes come from the operator: the model declares none."""
    model = bare_model(attributes_for(2, 2))
    declared = {x.name: [d.dim_value or d.dim_param for d in x.type.tensor_type.shape.dim] for x in model.graph.output}
    for info in model.graph.output:
        info.ClearField("type")
    outputs = open_session(model, onnxruntime_stub).get_outputs()
    assert {x.name: x.shape for x in outputs} == declared
    assert [x.type for x in outputs[:3]] == ["tensor(float16)", "tensor(int32)", "tensor(float16)"]


def test_attributes_that_are_left_out_have_their_defaults(onnxruntime_stub: Path) -> None:
    attributes = Attributes(**OperatorAttributes(key_bits=1, value_bits=1).to_dict())
    model, inputs = bare_model(attributes), call_for(attributes)
    del model.graph.node[0].attribute[:]
    reference = Reference(onnxruntime_stub, [OperatorAttributes()])
    output = open_session(model, onnxruntime_stub).run(["output"], inputs)[0]
    assert reference.failure is None
    assert same_bits(output, arrays(run_op(tensors(inputs, DIMS.float_type), attributes))["output"])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"quantizer": "none"}, "quantizer is 'none'; give one of minmax, "),
        ({"correction_limit": 0.0}, "correction_limit is 0"),
        ({"group_size": 100}, "the stub refuses this"),
        ({"key_bits": "one"}, "key_bits"),
        ({"quantizer": "shaped"}, "14 inputs and 7 outputs; expected 17 and 7"),
        ({"text_bits": 8}, "text_bits is 8, but text_key has the type of 16 bits"),
        ({"group_size": 2**40}, "group_size is 1099511627776; give less than 2.31"),
    ],
)
def test_wrong_nodes_are_refused_at_the_opening(onnxruntime_stub: Path, change: dict[str, Any], message: str) -> None:
    model = bare_model(attributes_for(1, 1, quantizer="lloyd"))
    ((name, value),) = change.items()
    node = model.graph.node[0]
    node.attribute.remove(next(a for a in node.attribute if a.name == name))
    node.attribute.append(onnx.helper.make_attribute(name, value))
    with pytest.raises(Exception, match=message):
        open_session(model, onnxruntime_stub)


def test_wrong_shapes_are_refused(onnxruntime_stub: Path) -> None:
    attributes = attributes_for(1, 1)
    session, inputs = open_session(bare_model(attributes), onnxruntime_stub), call_for(attributes)
    wrong = inputs | {"slot": np.zeros(4, np.int32)}
    reference = Reference(onnxruntime_stub, [OperatorAttributes(quantizer="shaped")])
    with pytest.raises(Exception, match=r"slot has size 4 on axis 0; expected 3 \(B\)"):
        session.run(None, wrong)
    assert reference.calls == []
    with pytest.raises(Exception, match="the stub refuses this"):
        session.run(None, inputs)  # the reference misses the metrics, and fails
    assert reference.failure is not None


@pytest.mark.parametrize("version", ["1.22.3", "0.30.0", "none"])
def test_an_older_onnxruntime_is_refused_in_one_line(onnxruntime_stub: Path, version: str) -> None:
    """With an onnxruntime of this version, of whose table only what makes an error is there."""
    said: list[tuple[int, str]] = []
    asked: list[int] = []
    name = ctypes.create_string_buffer(version.encode())

    @ctypes.CFUNCTYPE(ctypes.c_void_p, ctypes.c_int, ctypes.c_char_p)
    def create_status(code: int, message: bytes) -> int:
        said.append((code, message.decode()))
        return 1

    table = (ctypes.c_void_p * 1)(ctypes.cast(create_status, ctypes.c_void_p))

    @ctypes.CFUNCTYPE(ctypes.c_void_p, ctypes.c_uint32)
    def get_api(number: int) -> int:
        asked.append(number)
        return ctypes.addressof(table)

    version_of = ctypes.CFUNCTYPE(ctypes.c_void_p)(lambda: ctypes.addressof(name))
    base = (ctypes.c_void_p * 2)(*(ctypes.cast(function, ctypes.c_void_p) for function in (get_api, version_of)))
    register = ctypes.CDLL(str(onnxruntime_stub)).RegisterCustomOps
    register.restype, register.argtypes = ctypes.c_void_p, (ctypes.c_void_p, ctypes.c_void_p)
    assert register(None, base) == 1
    assert asked == [1]
    assert said == [(1, f"libvkvx_onnxruntime: needs onnxruntime 1.23 or newer, but this is {version}")]


def test_places_in_the_table_are_those_of_the_header() -> None:
    """Where onnxruntime's header is: functions, the custom op, and numbers of enumerations."""
    header = _header()
    if header is None:
        pytest.skip("needs onnxruntime_c_api.h, in $ORT_ROOT or the system's folders")
    text = re.sub(r"/\*.*?\*/|//[^\n]*", "", header.read_text(), flags=re.DOTALL)
    body = text[text.index("struct OrtApi {") :]
    body = body[: body.index("\n};")]
    entry = r"ORT_API2_STATUS\(\s*(\w+)|ORT_CLASS_RELEASE(?:2)?\(\s*(\w+)|\(\s*ORT_API_CALL\s*\*\s*(\w+)\s*\)"
    places = [a or (b and f"Release{b}") or c for a, b, c in re.findall(entry, body)]
    declared = _declared_places()
    assert {name: places.index(name) for name in declared} == declared
    op = text[text.index("struct OrtCustomOp {") :]
    fields = re.findall(r"\(\s*ORT_API_CALL\s*\*\s*(\w+)\s*\)", op[: op.index("\n};")])
    ours = (SOURCES / "api.h").read_text()
    ours = ours[ours.index("struct CustomOp {") :]
    assert fields[: ours.count("(*")] == re.findall(r"\(\*(\w+)\)", ours)


def test_the_declarations_are_all_used() -> None:
    code = "".join(path.read_text() for path in SOURCES.glob("*.cpp"))
    assert [name for name in _declared_places() if not re.search(rf"\b{name}\(", code)] == []


def _declared_places() -> dict[str, int]:
    found = re.findall(r"constexpr Entry<(\d+), .*> (\w+)\{\};", (SOURCES / "api.h").read_text())
    return {name: int(place) for place, name in found}


def _header() -> Path | None:
    roots = [Path(os.environ["ORT_ROOT"])] if "ORT_ROOT" in os.environ else [Path("/usr"), Path("/usr/local")]
    folders = ("", "include", "include/onnxruntime", "include/onnxruntime/core/session")
    candidates = (root / folder / "onnxruntime_c_api.h" for root in roots for folder in folders)
    return next((path for path in candidates if path.is_file()), None)


@pytest.fixture(scope="module")
def cuda_library(kernel_build: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The library itself, with the archive of kernels of this run."""
    folder = tmp_path_factory.mktemp("custom-op")
    kernels = kernel_build / build.KERNELS
    run(["cmake", "-S", str(build.SOURCES), "-B", str(folder), f"-DVKVX_KERNELS={kernels}", "-DVKVX_ONNXRUNTIME=ON"])
    run(["cmake", "--build", str(folder), "--parallel", "2"])
    return folder / build.ONNXRUNTIME


def test_the_library_exports_one_symbol_and_needs_no_other_library(cuda_library: Path) -> None:
    symbols = subprocess.run(
        ["nm", "-D", "--defined-only", str(cuda_library)], capture_output=True, text=True, check=True
    )
    assert [line.split()[-1] for line in symbols.stdout.splitlines()] == ["RegisterCustomOps"]
    needed = subprocess.run(["readelf", "-d", str(cuda_library)], capture_output=True, text=True, check=True).stdout
    assert not re.search(r"NEEDED.*(onnxruntime|cudart|libvkvx)", needed)


def test_without_a_gpu_the_library_loads_and_the_node_has_no_kernel(cuda_library: Path) -> None:
    if "CUDAExecutionProvider" in onnxruntime.get_available_providers():
        pytest.skip("there is a CUDA provider")
    with pytest.raises(Exception, match="VisualKVAttention"):
        open_session(bare_model(attributes_for(1, 1)), cuda_library)
