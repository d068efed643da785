"""What the runtime relies on in onnxruntime, on graphs of a few nodes."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnx
import onnxruntime as ort
import pytest
from onnx import TensorProto, helper

from vkvx import Session
from vkvx.errors import DependencyError, OptionError
from vkvx.manifest import Manifest
from vkvx.runtime.backends.onnxruntime import overloads
from vkvx.runtime.backends.onnxruntime.backend import OnnxRuntimeBackend, OrtStorage
from vkvx.runtime.backends.onnxruntime.bf16 import widen

OPSETS = [helper.make_opsetid("", 18), helper.make_opsetid("local", 1)]


def scatter(dtype: int) -> ort.InferenceSession:
    """present = past with rows written; old = a row of past as it was."""
    nodes = [
        helper.make_node("ScatterND", ["past", "index", "rows"], ["present"]),
        helper.make_node("Gather", ["past", "which"], ["old"], axis=0),
    ]
    graph = helper.make_graph(
        nodes,
        "scatter",
        [
            helper.make_tensor_value_info("past", dtype, ["slots", "length", 256]),
            helper.make_tensor_value_info("index", TensorProto.INT64, ["n", 2]),
            helper.make_tensor_value_info("rows", dtype, ["n", 256]),
            helper.make_tensor_value_info("which", TensorProto.INT64, ["k"]),
        ],
        [
            helper.make_tensor_value_info("present", dtype, ["slots", "length", 256]),
            helper.make_tensor_value_info("old", dtype, ["k", "length", 256]),
        ],
    )
    return ort.InferenceSession(helper.make_model(graph, opset_imports=OPSETS, ir_version=10).SerializeToString())


TYPES = [(TensorProto.FLOAT, np.float32), (TensorProto.FLOAT16, np.float16), (TensorProto.INT32, np.int32)]


WRITE_NOTHING = """
import mmap, sys
import numpy as np
import onnxruntime as ort
from test_onnxruntime import TYPES, scatter

kind, dtype = TYPES[int(sys.argv[1])]
def buffer():
    memory = mmap.mmap(-1, 8 * 64 * 256 * np.dtype(dtype).itemsize, prot=mmap.PROT_READ)
    return ort.OrtValue.ortvalue_from_numpy(np.frombuffer(memory, dtype).reshape(8, 64, 256))

session, past = scatter(kind), buffer()
binding = session.io_binding()
binding.bind_cpu_input("index", np.zeros((0, 2), np.int64))
binding.bind_cpu_input("rows", np.zeros((0, 256), dtype))
binding.bind_cpu_input("which", np.zeros(0, np.int64))
binding.bind_ortvalue_input("past", past)
binding.bind_ortvalue_output("present", past if sys.argv[2] == "one" else buffer())
binding.bind_output("old")
session.run_with_iobinding(binding)
"""


@pytest.mark.parametrize("kind", range(len(TYPES)))
def test_one_buffer_as_past_and_present_is_not_copied(kind: int) -> None:
    # The buffers may only be read, so that a copy, be it onto itself, ends the process.
    codes = []
    for buffers in ("one", "two"):
        command = [sys.executable, "-c", WRITE_NOTHING, str(kind), buffers]
        folders = os.pathsep.join(sys.path)  # with those of the tests
        codes.append(subprocess.run(command, check=False, env={**os.environ, "PYTHONPATH": folders}).returncode)
    assert codes == [0, -signal.SIGSEGV]


@pytest.mark.parametrize(("kind", "dtype"), TYPES)
def test_one_buffer_as_past_and_present(kind: int, dtype: type) -> None:
    session = scatter(kind)
    past = np.full((8, 64, 256), 7, dtype)
    rows = np.array([[3] * 256, [5] * 256], dtype)
    binding = session.io_binding()
    binding.bind_cpu_input("index", np.array([[3, 7], [2, 9]], np.int64))
    binding.bind_cpu_input("rows", rows)
    binding.bind_cpu_input("which", np.zeros(0, np.int64))
    binding.bind_ortvalue_input("past", ort.OrtValue.ortvalue_from_numpy(past))
    binding.bind_output("old")

    copied = np.zeros_like(past)
    for target in (copied, past):
        binding.bind_ortvalue_output("present", ort.OrtValue.ortvalue_from_numpy(target))
        session.run_with_iobinding(binding)
    expected = np.full_like(past, 7)
    expected[[3, 2], [7, 9]] = rows
    np.testing.assert_array_equal(past, expected)
    np.testing.assert_array_equal(copied, expected)


@pytest.mark.parametrize(("kind", "dtype"), TYPES)
def test_empty_buffers_may_be_bound(kind: int, dtype: type) -> None:
    session = scatter(kind)
    value = ort.OrtValue.ortvalue_from_numpy(np.zeros((8, 0, 256), dtype))
    binding = session.io_binding()
    binding.bind_cpu_input("index", np.zeros((0, 2), np.int64))
    binding.bind_cpu_input("rows", np.zeros((0, 256), dtype))
    binding.bind_cpu_input("which", np.array([1], np.int64))
    binding.bind_ortvalue_input("past", value)
    binding.bind_ortvalue_output("present", value)
    binding.bind_output("old")
    session.run_with_iobinding(binding)
    assert binding.get_outputs()[1].numpy().shape == (1, 0, 256)


def bfloat16_model(folder: Path) -> Path:
    """(x @ weight + 1.5)[columns], the addition in a local function with a subgraph, weights in an external file."""
    weight = np.arange(64 * 8).reshape(64, 8).astype(ml_dtypes.bfloat16)
    columns = np.array([5, 0, 2], np.int64)
    (folder / "weights.bin").write_bytes(b"--------" + weight.tobytes() + columns.tobytes())
    initializers = []
    for name, kind, values, offset in (
        ("weight", TensorProto.BFLOAT16, weight, 8),
        ("columns", TensorProto.INT64, columns, 8 + weight.nbytes),
    ):
        tensor = TensorProto(name=name, data_type=kind, dims=values.shape, data_location=TensorProto.EXTERNAL)
        for key, value in (("location", "weights.bin"), ("offset", offset), ("length", values.nbytes)):
            tensor.external_data.add(key=key, value=str(value))
        initializers.append(tensor)
    half = helper.make_tensor(
        "half", TensorProto.BFLOAT16, [1], np.array([0.5], ml_dtypes.bfloat16).tobytes(), raw=True
    )
    initializers.append(helper.make_tensor("one", TensorProto.BFLOAT16, [1], [1.0]))
    then = helper.make_graph(
        [helper.make_node("Constant", [], ["c"], value=half), helper.make_node("Add", ["a", "c"], ["s"])],
        "then",
        [],
        [helper.make_tensor_value_info("s", TensorProto.BFLOAT16, None)],
    )
    other = helper.make_graph(
        [helper.make_node("Identity", ["a"], ["t"])],
        "else",
        [],
        [helper.make_tensor_value_info("t", TensorProto.BFLOAT16, None)],
    )
    function = helper.make_function(
        "local",
        "AddHalf",
        ["a"],
        ["b"],
        [
            helper.make_node("Constant", [], ["yes"], value=helper.make_tensor("yes", TensorProto.BOOL, [], [True])),
            helper.make_node("If", ["yes"], ["r"], then_branch=then, else_branch=other),
            helper.make_node("Cast", ["r"], ["f"], to=TensorProto.FLOAT),
            helper.make_node("Cast", ["f"], ["b"], to=TensorProto.BFLOAT16),
        ],
        OPSETS,
    )
    graph = helper.make_graph(
        [
            helper.make_node("MatMul", ["x", "weight"], ["y"]),
            helper.make_node("Add", ["y", "one"], ["y1"]),
            helper.make_node("AddHalf", ["y1"], ["z"], domain="local"),
            helper.make_node("Gather", ["z", "columns"], ["out"], axis=1),
        ],
        "model",
        [helper.make_tensor_value_info("x", TensorProto.BFLOAT16, ["B", 64])],
        [helper.make_tensor_value_info("out", TensorProto.BFLOAT16, ["B", 3])],
        initializers,
    )
    model = helper.make_model(graph, functions=[function], opset_imports=OPSETS, ir_version=10)
    onnx.save(model, folder / "model.onnx")
    return folder / "model.onnx"


def test_a_bfloat16_graph_runs_as_float32(tmp_path: Path) -> None:
    path = bfloat16_model(tmp_path)
    with pytest.raises(Exception, match=r"(?i)bfloat16|not.implemented"):
        ort.InferenceSession(str(path))
    model = onnx.load(path, load_external_data=False)
    values = widen(model, tmp_path)
    assert {name: value.dtype.name for name, value in values.items()} == {"weight": "float32", "columns": "int64"}
    options = ort.SessionOptions()
    options.add_external_initializers(list(values), [ort.OrtValue.ortvalue_from_numpy(v) for v in values.values()])
    session = ort.InferenceSession(model.SerializeToString(), options)
    x = np.random.default_rng(0).standard_normal((2, 64)).astype(np.float32)
    (out,) = session.run(None, {"x": x})
    expected = x @ np.arange(64 * 8).reshape(64, 8).astype(ml_dtypes.bfloat16).astype(np.float32) + 1.5
    np.testing.assert_allclose(out, expected[:, [5, 0, 2]], rtol=1e-5)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "int32"])
def test_device_buffers_are_copied_and_read_through_main_memory(dtype: str) -> None:
    storage = OrtStorage(ort, "cpu")  # the same calls as on a GPU, on the only device there is everywhere
    buffer = storage.allocate(dtype, (3, 2, 5, 4))
    contents = np.arange(120).reshape(3, 2, 5, 4).astype(np.uint16 if dtype == "bfloat16" else dtype)
    buffer.update_inplace(contents)
    storage.copy(buffer, 2, 0, 3)
    contents[0, :, :3] = contents[2, :, :3]
    read = storage.read(buffer)
    assert read.dtype.name == dtype
    np.testing.assert_array_equal(read.view(contents.dtype), contents)
    np.testing.assert_array_equal(storage.read(buffer, 1).view(contents.dtype), contents[1])


@pytest.mark.skipif("CUDAExecutionProvider" in ort.get_available_providers(), reason="there is a CUDA provider")
def test_a_missing_provider_says_what_to_install() -> None:
    with pytest.raises(DependencyError, match=r"pip install .onnxruntime-gpu"):
        open_with(provider="cuda")


@pytest.mark.parametrize(
    ("options", "match"), [({"provider": "tpu"}, "auto, cpu, cuda"), ({"threads": 0}, "--threads")]
)
def test_unusable_options(options: dict[str, Any], match: str) -> None:
    with pytest.raises(OptionError, match=match):
        open_with(**options)


def open_with(**options: Any) -> OnnxRuntimeBackend:
    manifest: Any = None
    typed: Manifest = manifest  # refused before it is looked at
    return OnnxRuntimeBackend(Path(), typed, slots=1, visual_tokens=1, text_tokens=1, **options)


@pytest.mark.parametrize(("version", "known"), [("1.23.2", False), ("1.26.0", False), ("1.27.0", True), ("2.0", True)])
def test_versions_that_know_overloads(version: str, known: bool) -> None:
    assert overloads.are_known(version) is known


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_layers_of_different_bits_where_overloads_are_not_known(
    dtype: str, bundle_factory: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As in onnxruntime 1.23 to 1.26; `make lower-bounds` runs this with 1.23 itself."""
    bundle = bundle_factory(bits_per_layer="0:8,1-:2", dtype=dtype)
    answers = []
    for known in (overloads.are_known(ort.__version__), False):
        monkeypatch.setattr(overloads, "are_known", lambda version, known=known: known)
        with Session.load(bundle, backend="onnxruntime", provider="cpu") as session:
            answers.append(session.generate("What is 2 + 2?", max_new_tokens=6, ignore_eos=True).token_ids)
    assert answers[0] == answers[1]
    model = onnx.load(bundle / "decoder.onnx", load_external_data=False)
    overloads.separate(model)
    names = [function.name for function in model.functions]
    assert len(set(names)) == len(names) == 2
    assert {node.op_type for node in model.graph.node if node.domain} == set(names)
