"""Memory, copies and captured graphs of one NVIDIA GPU, through the CUDA runtime of cuda-python.

All work goes to one stream of this module's own; nothing waits for the device but :meth:`Device.synchronize`,
:meth:`Event.synchronize` and the methods that say so.
"""

from __future__ import annotations

import ctypes
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from math import prod
from typing import Any

import numpy as np

from vkvx.cache_layout import tensor_bytes
from vkvx.errors import CapacityError, DeviceError
from vkvx.runtime.cache import Shape, numpy_dtype
from vkvx.runtime.engines.gpus import Gpu, error_text, load_cuda, use_gpu

ALIGNMENT = 256
"""What the CUDA runtime aligns an allocation to; parts of one allocation keep to it as well."""


class DeviceArray:
    """An array in device memory, C-contiguous; freed when the last reference goes.

    ``dtype`` is a dtype name of a manifest. An empty array has a valid address all the same: TensorRT takes no null.
    NumPy converts one by a copy to main memory (``np.asarray``), which waits for the device.
    """

    def __init__(self, device: Device, dtype: str, shape: Shape, address: int) -> None:
        self.device, self.dtype, self.shape, self.address = device, dtype, tuple(shape), address

    @property
    def nbytes(self) -> int:
        """Bytes of the elements."""
        return tensor_bytes(self.dtype, self.shape)

    def __len__(self) -> int:
        return self.shape[0]

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        if copy is False:
            raise ValueError("an array on a device cannot be had without a copy")
        contents = self.device.download(self)
        return contents if dtype is None else contents.astype(dtype)


class PinnedMemory:
    """Bytes of main memory that the device reads and writes while the processor goes on."""

    def __init__(self, device: Device, size: int) -> None:
        self.size = size
        self.address = int(device.check(device.cuda.cudaMallocHost(max(size, 1)), f"{size} bytes of pinned memory"))
        weakref.finalize(self, device.cuda.cudaFreeHost, self.address)

    def view(self, offset: int, dtype: str, shape: Shape) -> np.ndarray:
        """A part as an array, without a copy. It must not outlive this object."""
        kind = numpy_dtype(dtype)
        size = kind.itemsize * prod(shape)
        if offset + size > self.size:
            raise ValueError(f"bytes {offset} to {offset + size} of {self.size}")
        raw = (ctypes.c_uint8 * size).from_address(self.address + offset)
        return np.ctypeslib.as_array(raw).view(kind).reshape(shape)


class CapturedGraph:
    """Work of a stream that was captured, to be launched at once as often as wanted."""

    def __init__(self, device: Device, handle: Any) -> None:
        cuda = device.cuda
        self.handle = handle
        weakref.finalize(self, cuda.cudaGraphDestroy, handle)
        self._device = device
        self._executable = device.check(cuda.cudaGraphInstantiate(handle, 0), "a CUDA graph")
        weakref.finalize(self, cuda.cudaGraphExecDestroy, self._executable)

    def launch(self) -> None:
        """Queue the work once more."""
        self._device.check(self._device.cuda.cudaGraphLaunch(self._executable, self._device.stream), "a CUDA graph")


class Event:
    """A mark in the work of a device's stream, for the processor to wait for."""

    def __init__(self, device: Device) -> None:
        cuda = device.cuda
        self._device = device
        self._handle = device.check(cuda.cudaEventCreateWithFlags(cuda.cudaEventDisableTiming), "an event")
        weakref.finalize(self, cuda.cudaEventDestroy, self._handle)

    def record(self) -> None:
        """Put the mark behind what is queued now."""
        self._device.check(self._device.cuda.cudaEventRecord(self._handle, self._device.stream), "an event")

    def synchronize(self) -> None:
        """Wait until what was queued before the mark is done. Raises DeviceError if some of it failed."""
        self._device.check(self._device.cuda.cudaEventSynchronize(self._handle), "the work queued before")


class Device:
    """A GPU, and a stream on it. Raises DeviceError if CUDA refuses it."""

    def __init__(self, gpu: Gpu) -> None:
        self.gpu = gpu
        self._cuda = load_cuda()
        cuda = self.cuda
        self._stream = self.check(cuda.cudaStreamCreateWithFlags(cuda.cudaStreamNonBlocking), "a stream")
        weakref.finalize(self, cuda.cudaStreamDestroy, self._stream)
        # What empty arrays point to.
        self._dummy = self.allocate("int32", (ALIGNMENT // 4,))

    @property
    def cuda(self) -> Any:
        """The CUDA runtime, with this GPU as the current one of the calling thread.

        Threads come and go, and other code of the process may use other GPUs, so that is said before every use.
        """
        use_gpu(self.gpu, self._cuda)
        return self._cuda

    @property
    def stream(self) -> Any:
        """The stream, as cuda-python wants it; ``int(stream)`` is what TensorRT wants."""
        return self._stream

    def check(self, result: tuple[Any, ...], what: str) -> Any:
        """The value of a CUDA call that returned ``(error, value)``, or None.

        Raises CapacityError if memory ran out, DeviceError for anything else; both name ``what`` was asked for.
        """
        error, *values = result
        if error == self._cuda.cudaError_t.cudaErrorMemoryAllocation:
            free = self.cuda.cudaMemGetInfo()[1]
            raise CapacityError(
                f"memory of {self.gpu} ran out: {what} wanted, {free:,} bytes free; use fewer slots= or smaller "
                "visual_tokens= (--max-visual-tokens) and text_tokens= (--max-text-tokens)"
            )
        if error != self._cuda.cudaError_t.cudaSuccess:
            reason = error_text(self._cuda, error)
            raise DeviceError(f"CUDA failed ({reason}) with {what} on {self.gpu}; see `vkvx doctor`")
        return values[0] if values else None

    def memory(self) -> tuple[int, int]:
        """Free and total bytes of the device."""
        error, free, total = self.cuda.cudaMemGetInfo()
        self.check((error,), "the memory's size")
        return int(free), int(total)

    def allocate(self, dtype: str, shape: Shape) -> DeviceArray:
        """An array with undefined contents. Raises CapacityError if it does not fit."""
        size = tensor_bytes(dtype, shape)
        if not size:
            return DeviceArray(self, dtype, shape, self._dummy.address)
        address = int(self.check(self.cuda.cudaMalloc(size), f"{size:,} bytes"))
        array = DeviceArray(self, dtype, shape, address)
        weakref.finalize(array, self.cuda.cudaFree, address)
        return array

    def copy(self, target: int, source: int, size: int) -> None:
        """Queue a copy of ``size`` bytes between addresses of the device or of pinned memory."""
        kind = self._cuda.cudaMemcpyKind.cudaMemcpyDefault
        self.check(self.cuda.cudaMemcpyAsync(target, source, size, kind, self.stream), f"a copy of {size} bytes")

    def copy_rows(self, target: int, source: int, pitch: int, width: int, height: int) -> None:
        """Queue a copy of ``height`` rows of ``width`` bytes that lie ``pitch`` bytes apart on both sides."""
        kind = self._cuda.cudaMemcpyKind.cudaMemcpyDefault
        result = self.cuda.cudaMemcpy2DAsync(target, pitch, source, pitch, width, height, kind, self.stream)
        self.check(result, f"a copy of {height} rows of {width} bytes")

    def clear(self, array: DeviceArray) -> None:
        """Queue zeros for a whole array."""
        if array.nbytes:
            self.check(self.cuda.cudaMemsetAsync(array.address, 0, array.nbytes, self.stream), f"{array.nbytes} zeros")

    def upload(self, array: DeviceArray, contents: np.ndarray) -> None:
        """Replace the contents of an array by those of a NumPy array of the same bytes; waits for the device."""
        contents = np.ascontiguousarray(contents)
        if contents.nbytes != array.nbytes:
            raise ValueError(f"{contents.nbytes} bytes for an array of {array.nbytes}")
        if array.nbytes:
            self.copy(array.address, contents.ctypes.data, array.nbytes)
            self.synchronize()

    def download(self, array: DeviceArray) -> np.ndarray:
        """The contents of an array, in main memory; waits for the device."""
        contents = np.empty(array.shape, numpy_dtype(array.dtype))
        if array.nbytes:
            self.copy(contents.ctypes.data, array.address, array.nbytes)
            self.synchronize()
        return contents

    def synchronize(self) -> None:
        """Wait until all work that was queued is done. Raises DeviceError if some of it failed."""
        self.check(self.cuda.cudaStreamSynchronize(self.stream), "the work queued before")

    @contextmanager
    def capture(self) -> Iterator[list[CapturedGraph]]:
        """Capture what is queued inside the block, without running it; the list then holds the graph."""
        captured: list[CapturedGraph] = []
        # Other threads may go on using CUDA meanwhile.
        mode = self._cuda.cudaStreamCaptureMode.cudaStreamCaptureModeThreadLocal
        self.check(self.cuda.cudaStreamBeginCapture(self.stream, mode), "a capture")
        try:
            yield captured
        except BaseException:
            self.cuda.cudaStreamEndCapture(self.stream)  # a stream cannot be used while it captures
            raise
        captured.append(
            CapturedGraph(self, self.check(self.cuda.cudaStreamEndCapture(self.stream), "a captured graph"))
        )


class DeviceStorage:
    """Buffers of a :class:`vkvx.runtime.cache.PackedCache` in device memory."""

    def __init__(self, device: Device) -> None:
        self._device = device

    def allocate(self, dtype: str, shape: Shape) -> DeviceArray:
        return self._device.allocate(dtype, shape)

    def copy(self, buffer: DeviceArray, source: int, target: int, entries: int) -> None:
        _, heads, capacity, *entry_shape = buffer.shape
        entry = tensor_bytes(buffer.dtype, tuple(entry_shape))
        pitch = capacity * entry
        start = buffer.address
        self._device.copy_rows(
            start + target * heads * pitch, start + source * heads * pitch, pitch, entries * entry, heads
        )

    def read(self, buffer: DeviceArray, row: int | None = None) -> np.ndarray:
        if row is not None:
            shape = buffer.shape[1:]
            start = buffer.address + row * tensor_bytes(buffer.dtype, shape)
            return self._device.download(DeviceArray(self._device, buffer.dtype, shape, start))
        return self._device.download(buffer)

    def write(self, buffer: DeviceArray, contents: np.ndarray) -> None:
        self._device.upload(buffer, contents)
