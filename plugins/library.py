"""``libvkvx`` through ctypes: the parameter struct of ``vkvx.h`` and its functions. Needs no torch.

Pointers are plain integers (``tensor.data_ptr()``), streams likewise; ``docs/kernels.md`` says more.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterable, Mapping
from ctypes import POINTER, byref, c_char_p, c_float, c_int32, c_int64, c_size_t, c_uint32, c_uint64, c_void_p
from pathlib import Path
from typing import Any

import numpy as np

from vkvx.errors import DependencyError, OptionError, VkvxError
from vkvx.plugins import c_interface
from vkvx.plugins.c_interface import ABI_VERSION
from vkvx.plugins.c_interface import MAX_HEAD_DIM as MAX_HEAD_DIM
from vkvx.plugins.c_interface import MAX_VOCAB as MAX_VOCAB
from vkvx.plugins.operator import OperatorAttributes

DTYPES = c_interface.DTYPES.numbers
KERNELS = c_interface.KERNELS.numbers
QUANTIZERS = c_interface.enumerations()["quantizer"].numbers
CORRECTIONS = c_interface.enumerations()["correction"].numbers
_BAD_ARGUMENT, _UNSUPPORTED = (c_interface.RESULTS.numbers[name] for name in ("bad_argument", "unsupported"))
_EMPTY = 256
"""Address of an empty tensor: never read, but null says that a tensor is missing."""


def ctypes_fields(fields: Iterable[c_interface.Field]) -> list[tuple[str, Any]]:
    """The fields of a struct as ctypes wants them."""
    types = {
        "int32_t": c_int32,
        "uint32_t": c_uint32,
        "int64_t": c_int64,
        "uint64_t": c_uint64,
        "float": c_float,
        "int64_t[3]": c_int64 * 3,
        "size_t": c_size_t,
    }
    return [(field.name, c_void_p if field.type.endswith("*") else types[field.type]) for field in fields]


class Params(ctypes.Structure):
    """``VkvxParams`` of ``vkvx.h``; ``size`` is filled in."""

    _fields_ = ctypes_fields(c_interface.struct_fields())

    def __init__(self, **values: object) -> None:
        super().__init__(size=ctypes.sizeof(Params), **values)

    @classmethod
    def of(cls, tensors: Mapping[str, Any], attributes: OperatorAttributes, output: Any) -> Params:
        """All but the workspace of a call: from the operator's inputs by name, its attributes, and the output.

        Tensors have the methods of torch's. Those of ``STRIDED`` may lie in any order but for their last axis, the
        others are contiguous.
        """
        params = cls(**{name: getattr(attributes, attribute) for name, attribute in _PLAIN})
        for name, attribute, numbers in _NUMBERED:
            setattr(params, name, numbers[getattr(attributes, attribute)])
        params.dtype = DTYPES[str(tensors["query"].dtype).removeprefix("torch.")]
        for name, (tensor, axis), unit in _SIZES:
            setattr(params, name, tensors[tensor].shape[axis] * (getattr(attributes, unit) if unit else 1))
        for name in c_interface.STRIDED:
            getattr(params, f"{name}_stride")[:] = tensors[name].stride()[:3]
        for definition in attributes.inputs:
            tensor = tensors[definition.name]
            setattr(params, definition.name, tensor.data_ptr() if tensor.numel() else _EMPTY)
        params.output = output.data_ptr()
        return params


class SampleRow(ctypes.Structure):
    """``VkvxSampleRow`` of ``vkvx.h``."""

    _fields_ = ctypes_fields(c_interface.SAMPLE_ROW_FIELDS)


class SampleParams(ctypes.Structure):
    """``VkvxSampleParams`` of ``vkvx.h``; ``size`` is filled in."""

    _fields_ = ctypes_fields(c_interface.SAMPLE_FIELDS)

    def __init__(self, **values: object) -> None:
        super().__init__(size=ctypes.sizeof(SampleParams), **values)


def token_bits(token_ids: Iterable[int], vocab_size: int) -> np.ndarray:
    """INT32 [ceil(V/32)] with a bit for each of these tokens: a row of ``seen`` or ``excluded``. Others are ignored."""
    ids = np.asarray(token_ids if isinstance(token_ids, np.ndarray) else list(token_ids), np.int64)
    marks = np.zeros(-(-vocab_size // 32) * 32, bool)
    marks[ids[(ids >= 0) & (ids < vocab_size)]] = True
    return np.packbits(marks, bitorder="little").view(np.int32)


_FILLED = [field for field in c_interface.struct_fields() if field.attribute]
_PLAIN = [(f.name, f.attribute) for f in _FILLED if f.name not in c_interface.enumerations()]
_NUMBERED = [(f.name, f.attribute, e.numbers) for f in _FILLED if (e := c_interface.enumerations().get(f.name))]
_SIZES = [(f.name, c_interface.size_sources()[f.size], f.unit) for f in c_interface.struct_fields() if f.size]


class KernelLibrary:
    """A loaded ``libvkvx``. Its methods launch work on a stream of the current device and return at once."""

    def __init__(self, path: Path) -> None:
        """Load the library; DependencyError if it cannot be loaded or is of another version."""
        self.path = path
        try:
            self._library = ctypes.CDLL(str(path))
        except OSError as error:
            raise DependencyError(f"cannot load {path}: {error}; build it again with `vkvx plugin build`") from error
        if not hasattr(self._library, "vkvx_abi_version"):
            raise DependencyError(f"{path} does not hold the C interface of libvkvx; build it again")
        self._library.vkvx_last_error.restype = c_char_p
        version = self._library.vkvx_abi_version()
        if version != ABI_VERSION:
            raise DependencyError(
                f"{path} has version {version} of the C interface, this vkvx needs {ABI_VERSION}; "
                "build it again with `vkvx plugin build`"
            )
        for name in ("vkvx_workspace_bytes", "vkvx_workspace_bound", "vkvx_workspace_zeroed"):
            getattr(self._library, name).argtypes = (POINTER(Params), POINTER(c_size_t))
        for name in ("vkvx_attention", "vkvx_append", "vkvx_step"):
            getattr(self._library, name).argtypes = (POINTER(Params), c_void_p)
        self._library.vkvx_sample.argtypes = (POINTER(SampleParams), c_void_p)
        self._library.vkvx_last_tokens.argtypes = (c_int32, c_void_p, c_void_p, c_void_p, c_void_p)

    def workspace_bytes(self, params: Params) -> int:
        """Bytes of workspace for calls of these sizes; it must be zero before its first use."""
        return self._size("vkvx_workspace_bytes", params)

    def workspace_bound(self, params: Params) -> int:
        """Bytes that suffice for calls of at most these sizes, on any device."""
        return self._size("vkvx_workspace_bound", params)

    def workspace_zeroed(self, params: Params) -> int:
        """Bytes at the start of the workspace that have to be zero before a call with these parameters."""
        return self._size("vkvx_workspace_zeroed", params)

    def _size(self, function: str, params: Params) -> int:
        size = c_size_t()
        self._check(getattr(self._library, function)(byref(params), byref(size)))
        return size.value

    def attention(self, params: Params, stream: int) -> None:
        """Launch ``vkvx_attention``: fills the output, reads the caches."""
        self._check(self._library.vkvx_attention(byref(params), stream))

    def append(self, params: Params, stream: int) -> None:
        """Launch ``vkvx_append``: stores the call's tokens in the caches, in place."""
        self._check(self._library.vkvx_append(byref(params), stream))

    def step(self, params: Params, stream: int) -> None:
        """Launch ``vkvx_step``: the attention, then the append, at once where the call brings text alone."""
        self._check(self._library.vkvx_step(byref(params), stream))

    def sample(self, params: SampleParams, stream: int) -> None:
        """Launch ``vkvx_sample``: chooses each row's next token."""
        self._check(self._library.vkvx_sample(byref(params), stream))

    def last_tokens(self, rows: int, slot: int, last_token: int, input_ids: int, stream: int) -> None:
        """Launch ``vkvx_last_tokens``: negative entries of ``input_ids`` [rows] become their slots' last tokens."""
        self._check(self._library.vkvx_last_tokens(rows, slot, last_token, input_ids, stream))

    def _check(self, code: int) -> None:
        if code:
            message = self._library.vkvx_last_error().decode()
            raise (OptionError if code in (_BAD_ARGUMENT, _UNSUPPORTED) else VkvxError)(message)
