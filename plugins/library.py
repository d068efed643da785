"""``libvkvx`` through ctypes: the parameter struct of ``vkvx.h`` and its functions. Needs no torch.

Pointers are plain integers (``tensor.data_ptr()``), streams likewise; ``docs/plugins.md`` has an example.
"""

from __future__ import annotations

import ctypes
from ctypes import POINTER, byref, c_char_p, c_float, c_int32, c_int64, c_size_t, c_void_p
from pathlib import Path

from vkvx.errors import DependencyError, OptionError, VkvxError

ABI_VERSION = 2
DTYPES = {"float16": 0, "bfloat16": 1, "float32": 2}
QUANTIZERS = {"minmax": 0, "quantile": 1, "shrink": 2, "lloyd": 3, "shaped": 4}
CORRECTIONS = {"none": 0, "affine": 1, "expected": 2}
MAX_HEAD_DIM = 256
"""The widest head that the kernels take."""
KERNELS = {"auto": 0, "plain": 1, "codes": 2, "planes": 3, "prefill": 4}
_BAD_ARGUMENT, _UNSUPPORTED = 1, 2


class Params(ctypes.Structure):
    """``VkvxParams`` of ``vkvx.h``; ``size`` is filled in."""

    _fields_ = (
        *(
            (name, c_int32)
            for name in (
                *("size", "dtype", "rows", "positions", "slots", "query_heads", "kv_heads", "head_dim", "group_size"),
                *("visual_capacity", "text_capacity", "visual_entries", "text_entries", "key_bits", "value_bits"),
                *("quantizer", "correction", "kernel", "splits"),
            )
        ),
        *(
            (name, c_float)
            for name in (
                *("quantile_alpha_key", "quantile_alpha_value", "shrink_key", "shrink_value"),
                *("tau", "correction_limit", "scale"),
            )
        ),
        ("query_stride", c_int64 * 3),
        ("key_stride", c_int64 * 3),
        ("value_stride", c_int64 * 3),
        *(
            (name, c_void_p)
            for name in (
                *("query", "key", "value", "visual_index", "text_index", "slot", "visual_key", "visual_key_params"),
                *("visual_value", "visual_value_params", "visual_count", "text_key", "text_value", "text_count"),
                *("key_metric", "value_metric", "rotation", "output", "workspace"),
            )
        ),
        ("workspace_bytes", c_size_t),
    )

    def __init__(self, **values: object) -> None:
        super().__init__(size=ctypes.sizeof(Params), **values)


class Library:
    """A loaded ``libvkvx``. Its methods launch work on a stream of the current device and return at once."""

    def __init__(self, path: Path) -> None:
        """Load the library; DependencyError if it cannot be loaded or is of another version."""
        self.path = path
        try:
            self._library = ctypes.CDLL(str(path))
        except OSError as error:
            raise DependencyError(f"cannot load {path}: {error}; build it again with `vkvx plugin build`") from error
        self._library.vkvx_last_error.restype = c_char_p
        version = self._library.vkvx_abi_version()
        if version != ABI_VERSION:
            raise DependencyError(
                f"{path} has version {version} of the C interface, this vkvx needs {ABI_VERSION}; "
                "build it again with `vkvx plugin build`"
            )
        for name in ("vkvx_workspace_bytes", "vkvx_workspace_bound", "vkvx_workspace_zeroed"):
            getattr(self._library, name).argtypes = (POINTER(Params), POINTER(c_size_t))
        for name in ("vkvx_attention", "vkvx_append"):
            getattr(self._library, name).argtypes = (POINTER(Params), c_void_p)

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

    def _check(self, code: int) -> None:
        if code:
            message = self._library.vkvx_last_error().decode()
            raise (OptionError if code in (_BAD_ARGUMENT, _UNSUPPORTED) else VkvxError)(message)
