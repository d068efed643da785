"""What failures of onnxruntime become: not every one is a damaged file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import onnx.parser
import onnxruntime as ort
import pytest

from vkvx.errors import BundleError, CapacityError, DependencyError, DeviceError, VkvxError
from vkvx.manifest import Manifest
from vkvx.runtime.backends.onnxruntime.faults import explain
from vkvx.runtime.backends.registry import open_backend

FAIL = "[ONNXRuntimeError] : 6 : RUNTIME_EXCEPTION : Non-zero status code returned while running MatMul node. "
WORDS: list[tuple[str, type[VkvxError]]] = [
    (FAIL + "bfc_arena.cc:376 Failed to allocate memory for requested buffer of size 5368709120", CapacityError),
    ("CUDA failure 2: out of memory ; GPU=0 ; hostname=x ; expr=cudaMalloc((void**)&p, size);", CapacityError),
    ("std::bad_alloc", CapacityError),
    ("Available memory of 12 is smaller than requested bytes of 5368709120", CapacityError),
    ("CUBLAS failure 3: CUBLAS_STATUS_ALLOC_FAILED ; GPU=0", CapacityError),
    ("CUDA failure 700: an illegal memory access was encountered ; GPU=0", DeviceError),
    ("CUDNN failure 4: CUDNN_STATUS_INTERNAL_ERROR ; GPU=0", DeviceError),
    ("CUBLAS failure 13: CUBLAS_STATUS_EXECUTION_FAILED", DeviceError),
    ("VisualKVAttention: attention: no kernel image is available for execution on the device", DeviceError),
    ("[ONNXRuntimeError] : 9 : NOT_IMPLEMENTED : Could not find an implementation for Foo(1)", DependencyError),
    ("[ONNXRuntimeError] : 1 : FAIL : Unsupported model IR version: 99, max supported IR version: 11", DependencyError),
    ("[ONNXRuntimeError] : 7 : INVALID_PROTOBUF : Load model from x failed:Protobuf parsing failed.", BundleError),
    ("[ONNXRuntimeError] : 3 : NO_SUCHFILE : Load model from x failed. File doesn't exist", BundleError),
    (FAIL + "indices element out of data bounds, idx=9", BundleError),
]


@pytest.mark.parametrize(("text", "kind"), WORDS)
def test_what_a_failure_means(text: str, kind: type[VkvxError]) -> None:
    with pytest.raises(VkvxError) as error, explain(ort, "onnxruntime cannot load x"):
        raise RuntimeError(f"{text}\nand a stack trace")
    assert type(error.value) is kind
    assert str(error.value).startswith("onnxruntime cannot load x: ")
    assert "\n" not in str(error.value)
    assert ";" in str(error.value)


def test_memory_of_python_and_errors_of_vkvx() -> None:
    with pytest.raises(CapacityError, match="x: MemoryError; memory ran out"), explain(ort, "x"):
        raise MemoryError
    with pytest.raises(DeviceError, match=r"^y$"), explain(ort, "x"):
        raise DeviceError("y")


def session(text: str) -> Any:
    options = ort.SessionOptions()
    options.log_severity_level = 4
    model = onnx.parser.parse_model(text).SerializeToString()
    return ort.InferenceSession(model, options, providers=["CPUExecutionProvider"])


def test_failures_that_onnxruntime_itself_has() -> None:
    with pytest.raises(DependencyError, match=ort.__version__), explain(ort, "x"):
        session('<ir_version: 10, opset_import: ["": 18]> g (bfloat16[2] x) => (bfloat16[2] y) { y = Erf(x) }')
    with pytest.raises(DependencyError), explain(ort, "x"):
        session('<ir_version: 10, opset_import: ["": 18, "odd": 1]> g (float[1] x) => (float[1] y) { y = odd.Foo(x) }')
    with pytest.raises(DependencyError), explain(ort, "x"):
        session('<ir_version: 99, opset_import: ["": 18]> g (float[1] x) => (float[1] y) { y = Neg(x) }')
    with pytest.raises(BundleError), explain(ort, "x"):
        ort.InferenceSession(b"no model", providers=["CPUExecutionProvider"])


def test_a_damaged_graph_and_too_large_a_cache(own_bundle: Path) -> None:
    manifest = Manifest.load(own_bundle)
    options: dict[str, Any] = {"slots": 1, "visual_tokens": 640, "text_tokens": 8, "provider": "cpu"}
    with pytest.raises(CapacityError, match="main memory has no room for a tensor"):
        open_backend("onnxruntime", own_bundle, manifest, **{**options, "text_tokens": 1 << 45})
    (own_bundle / "decoder.onnx").write_bytes(b"no model")
    with pytest.raises(BundleError, match=r"decoder\.onnx"):
        open_backend("onnxruntime", own_bundle, manifest, **options)
