"""NumPy arrays and buffers on a GPU as OrtValues."""

from __future__ import annotations

from typing import Any

import numpy as np

from vkvx.runtime.cache import Shape, numpy_dtype

_ONNX_BFLOAT16 = 16  # TensorProto.BFLOAT16
ONNX_TYPES = {  # how a buffer on a device is bound
    "tensor(float)": np.float32,
    "tensor(float16)": np.float16,
    "tensor(int32)": np.int32,
    "tensor(uint16)": _ONNX_BFLOAT16,
}


class OrtStorage:
    """Buffers in the memory of a device, as OrtValues; bfloat16 as UINT16, which NumPy knows.

    onnxruntime offers no copy between parts of a device buffer, so :meth:`copy` goes through main memory. Empty buffers
    are NumPy arrays: onnxruntime binds no device address that is null.
    """

    def __init__(self, ort: Any, device: str) -> None:
        self._ort = ort
        self._device = device

    def allocate(self, dtype: str, shape: Shape) -> Any:
        kind = np.uint16 if dtype == "bfloat16" else np.dtype(dtype)
        if 0 in shape:
            return np.empty(shape, kind)
        return self._ort.OrtValue.ortvalue_from_shape_and_type(list(shape), kind, self._device, 0)

    def copy(self, buffer: Any, source: int, target: int, entries: int) -> None:
        contents = np.array(buffer.numpy())
        contents[target, :, :entries] = contents[source, :, :entries]
        buffer.update_inplace(contents)

    def read(self, buffer: Any, row: int | None = None) -> np.ndarray:
        if isinstance(buffer, np.ndarray):
            return buffer if row is None else buffer[row]
        contents = np.array(buffer.numpy())  # all of it: onnxruntime copies no part
        contents = contents if row is None else contents[row]
        return contents.view(numpy_dtype("bfloat16")) if contents.dtype == np.uint16 else contents

    def write(self, buffer: Any, contents: np.ndarray) -> None:
        if isinstance(buffer, np.ndarray):
            return
        buffer.update_inplace(contents.view(np.uint16) if contents.dtype.name == "bfloat16" else contents)


def ort_value(ort: Any, array: np.ndarray) -> Any:
    """An OrtValue on the memory of a C-contiguous array."""
    if array.dtype.name == "bfloat16":
        return ort.OrtValue.ortvalue_from_numpy_with_onnx_type(array.view(np.uint16), _ONNX_BFLOAT16)
    return ort.OrtValue.ortvalue_from_numpy(array)
