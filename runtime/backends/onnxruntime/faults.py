"""What a failure of onnxruntime means: its exceptions have no common base, and most of them are of one type."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from vkvx.errors import BundleError, CapacityError, DependencyError, DeviceError, VkvxError
from vkvx.packages import requirement

_MEMORY = re.compile(
    r"failed to allocate|bad.?alloc|out of memory|not enough memory|smaller than requested|ALLOC_FAILED|BFCArena", re.I
)
_DEVICE = re.compile(
    r"\b(CUDA|CUDNN|CUBLAS|CUFFT|CURAND)(LT)? (failure|error)|cudaError|CU(DNN|BLAS)_STATUS|no kernel image"
)
_VERSION = re.compile(
    r"NOT_IMPLEMENTED|could not find an implementation|not a registered function/op|unsupported model IR version|"
    r"no op registered|under development|opset \d+ is not supported|no schema registered",
    re.I,
)


@contextmanager
def explain(ort: Any, what: str) -> Iterator[None]:
    """Turn a failure of onnxruntime inside the block into one line that begins with ``what``.

    CapacityError where memory ran out, DeviceError where a GPU failed, DependencyError where this onnxruntime lacks
    something, BundleError for anything else: then it is the file. Errors of vkvx pass.
    """
    try:
        yield
    except VkvxError:
        raise
    except Exception as error:
        raise _classify(ort, what, error) from error


def _classify(ort: Any, what: str, error: Exception) -> VkvxError:
    text = str(error).strip()
    words = f"{what}: {(text.splitlines() or [type(error).__name__])[0]}"
    if isinstance(error, MemoryError) or _MEMORY.search(text):
        return CapacityError(
            f"{words}; memory ran out: use fewer slots= or smaller visual_tokens= (--max-visual-tokens) and "
            "text_tokens= (--max-text-tokens), or a smaller model; on a GPU --provider cpu, too"
        )
    if _DEVICE.search(text):
        return DeviceError(f"{words}; see `vkvx doctor`, or give --provider cpu")
    if type(error).__name__ == "NotImplemented" or _VERSION.search(text):
        return DependencyError(
            f"{words}; onnxruntime {ort.__version__} lacks what the graph needs: install another version of "
            f"'{requirement('onnxruntime')}', or give --provider cpu if it ran on a GPU"
        )
    return BundleError(f"{words}; copy the bundle again, or export the model again")
