"""The custom operator of onnxruntime on a CPU: a stub of libvkvx takes its calls, the torch reference answers them."""

from __future__ import annotations

import ctypes
import shutil
from collections.abc import Sequence
from ctypes import CFUNCTYPE, POINTER, c_int
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from operator_cases import CACHES
from oracle import Attributes
from plugin_calls import run
from torch_calls import run_op, tensors

from vkvx.plugins import build
from vkvx.plugins.library import DTYPES, Params
from vkvx.plugins.operator import OperatorAttributes

STUB = Path(__file__).with_name("onnxruntime_stub.cpp")
SOURCES = build.SOURCES / "onnxruntime"
_Step = CFUNCTYPE(c_int, POINTER(Params), c_int)
_SIZES = {2: ctypes.c_uint16, 4: ctypes.c_uint32}


def build_stub(folder: Path) -> Path:
    """The library of the operator for the CPU provider; skips the test without a compiler."""
    if shutil.which("nvcc") is None:
        pytest.skip("needs nvcc")
    path = folder / "stub.so"
    sources = [build.SOURCES / "node.cpp", *SOURCES.glob("*.cpp"), STUB]
    flags = ["-std=c++17", "-shared", "-cudart=none", "-Xcompiler=-fPIC", '-DVKVX_PROVIDER="CPUExecutionProvider"']
    run(["nvcc", *flags, "-I", str(build.SOURCES), *map(str, sources), "-o", str(path)])
    return path


class Reference:
    """Answers the calls of a stub by the torch op, for nodes with these attributes in turn; not for BF16."""

    def __init__(self, library: Path, attributes: Sequence[OperatorAttributes]) -> None:
        self.calls: list[tuple[Params, bool]] = []
        """Params of each call, and whether it appends."""
        self.failure: BaseException | None = None
        self._attributes = attributes
        self._step = _Step(self._answer)  # kept: the stub calls it
        ctypes.CDLL(str(library)).set_step(self._step)

    def _answer(self, pointer: Any, appends: int) -> int:
        try:
            self._run(pointer.contents, bool(appends))
        except BaseException as error:
            self.failure = error
            return 2
        return 0

    def _run(self, params: Params, appends: bool) -> None:
        attributes = self._attributes[len(self.calls) % len(self._attributes)]
        self.calls.append((Params.from_buffer_copy(params), appends))
        assert params.workspace_bytes == 1000
        assert not any((ctypes.c_uint8 * 24).from_address(params.workspace))
        dtype = next(name for name, number in DTYPES.items() if number == params.dtype)
        views = {}
        for definition in attributes.inputs:
            kind = np.dtype(dtype if definition.dtype == "T" else definition.dtype)
            shape = [_size(params, symbol) for symbol in definition.shape]
            views[definition.name] = _view(getattr(params, definition.name), kind, shape)
        named = tensors({name: x.copy() for name, x in views.items()}, dtype)
        results = run_op(named, Attributes(**attributes.to_dict()))
        _view(params.output, np.dtype(dtype), list(views["query"].shape))[...] = results["output"].numpy()
        for name in CACHES if appends else ():
            views[name][...] = results[name].numpy()


def _size(params: Params, symbol: str) -> int:
    """The size that a symbol of the operator's table stands for in a call."""
    bits = (1, 1) if params.key_bits == 16 else (params.key_bits, params.value_bits)
    sizes = {
        "B": params.rows,
        "S": params.positions,
        "Bc": params.slots,
        "Hq": params.query_heads,
        "Hkv": params.kv_heads,
        "D": params.head_dim,
        "N": params.text_capacity,
        "Nv": params.visual_entries,
        "Nt": params.text_entries,
        "bk": bits[0],
        "bv": bits[1],
        "C/128": params.visual_capacity // 128,
        "G": params.visual_capacity // params.group_size,
        "D/32": params.head_dim // 32,
        "D/4+1": params.head_dim // 4 + 1,
    }
    return sizes.get(symbol) if symbol in sizes else int(symbol)  # type: ignore[return-value]


def _view(address: int, dtype: np.dtype, shape: Sequence[int]) -> np.ndarray:
    """An array on the memory of a call."""
    count = int(np.prod(shape))
    if not count:
        return np.zeros(shape, dtype)
    raw = (_SIZES[dtype.itemsize] * count).from_address(address)
    return np.ctypeslib.as_array(raw).view(dtype).reshape(shape)
