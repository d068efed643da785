"""Stand-ins for the CUDA runtime and TensorRT on a machine without a GPU.

Device memory is main memory that is watched: poisoned when allocated, never handed out twice, and refused after it was
freed. An engine file names an ONNX file, which a context runs in onnxruntime on the very addresses that were bound, so
the backend's own work (profiles, padding, addresses, counts, captures) is checked by the tokens that come out.
"""

from __future__ import annotations

import bisect
import ctypes
import json
import sys
import threading
from collections.abc import Callable, Mapping
from enum import IntEnum
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import onnxruntime as ort
import pytest
from sampling_double import SamplingLibrary

from vkvx.manifest import FileInfo, Manifest, sha256
from vkvx.runtime.backends.tensorrt import engine as tensorrt_engine
from vkvx.runtime.backends.tensorrt import sampling as tensorrt_sampling
from vkvx.runtime.engines.limits import build_profiles
from vkvx.runtime.engines.manifest import (
    DECODER,
    FILE_NAME,
    FOLDER,
    VISION,
    EngineInfo,
    EngineManifest,
    EngineTensor,
    Limits,
    PluginInfo,
    bundle_hash,
    directory_name,
)

POISON = 0xFF
STREAMS = 7
"""The handle of the stream on GPU 0; others follow."""
TYPES = {"float16": np.float16, "float32": np.float32, "int32": np.int32}


class CudaError(IntEnum):
    cudaSuccess = 0
    cudaErrorMemoryAllocation = 2
    cudaErrorNoDevice = 100
    cudaErrorInvalidDevice = 101
    cudaErrorIllegalAddress = 700


class Cuda(ModuleType):
    """``cuda.bindings.runtime``, as far as the backend uses it."""

    cudaError_t = CudaError
    cudaStreamNonBlocking = 1
    cudaEventDisableTiming = 2
    cudaMemcpyKind = SimpleNamespace(cudaMemcpyDefault=4)
    cudaStreamCaptureMode = SimpleNamespace(cudaStreamCaptureModeThreadLocal=1)

    def __init__(self, *capabilities: str, memory: int = 1 << 32) -> None:
        """GPUs of these compute capabilities; ``memory`` is that of each."""
        super().__init__("cuda.bindings.runtime")
        self.capabilities, self.memory = list(capabilities), memory
        self.thread = threading.local()  # the current GPU is kept for each thread, and is GPU 0 at first
        self.owners: dict[int, int] = {}  # address of an allocation, or a stream -> GPU
        self.touched: set[int] = set()  # GPUs that got a context
        self.blocks: dict[int, Any] = {}  # address -> buffer, alive
        self.starts: list[int] = []
        self.ends: dict[int, int] = {}
        self.keep: list[Any] = []  # freed memory is not given back, so that its use is seen
        self.recording: list[Callable[[], None]] | None = None
        self.queue: list[tuple[int, Callable[[], None]]] = []  # what was asked for, by GPU, and nobody waited for yet
        self.done = 0  # how much was done before that
        self.synchronized = 0
        self.launched = 0

    @property
    def current(self) -> int:
        """The GPU of the calling thread, which is about to be used."""
        index: int = getattr(self.thread, "index", 0)
        self.touched.add(index)
        return index

    # Memory

    def cudaMalloc(self, size: int) -> tuple[CudaError, int]:
        used = sum(self.ends[start] - start for start in [*self.blocks] if self.owners[start] == self.current)
        if used + size > self.memory:
            return CudaError.cudaErrorMemoryAllocation, 0
        buffer = (ctypes.c_uint8 * (size + 512))()
        ctypes.memset(buffer, POISON, size + 512)
        address = -(-ctypes.addressof(buffer) // 256) * 256
        self.blocks[address] = buffer
        self.ends[address] = address + size
        self.owners[address] = self.current
        bisect.insort(self.starts, address)
        return CudaError.cudaSuccess, address

    def cudaFreeHost(self, address: int) -> tuple[CudaError]:
        self.keep.append(self.blocks.pop(address))
        return (CudaError.cudaSuccess,)

    cudaMallocHost = cudaMalloc

    def cudaFree(self, address: int) -> tuple[CudaError]:
        self.run(len(self.queue))  # it waits for the device
        return self.cudaFreeHost(address)

    def check(self, address: int, size: int) -> None:
        """Memory that was allocated must still be there, and long enough; other addresses are the processor's."""
        at = bisect.bisect_right(self.starts, address) - 1
        if at >= 0 and address < self.ends[self.starts[at]]:
            assert self.starts[at] in self.blocks, "memory is used after it was freed"
            assert address + size <= self.ends[self.starts[at]], "an access reaches past its allocation"
            assert self.owners[self.starts[at]] == self.current, "memory is used on another GPU than its own"

    def check_stream(self, stream: int) -> None:
        """A stream takes work only while its GPU is the current one."""
        assert int(stream) == STREAMS + self.current, "a stream is used while another GPU is the current one"

    def do(self, work: Callable[[], None]) -> tuple[CudaError]:
        if self.recording is None:
            self.queue.append((self.current, work))
        else:
            self.recording.append(work)
        return (CudaError.cudaSuccess,)

    def run(self, count: int) -> None:
        """Do so much of what was asked for: not before somebody waits for it, as late as a device may."""
        waiting, self.queue = self.queue[:count], self.queue[count:]
        self.done += len(waiting)
        index = self.current
        for self.thread.index, work in waiting:
            work()
        self.thread.index = index

    def cudaMemcpyAsync(self, target: int, source: int, size: int, kind: int, stream: Any) -> tuple[CudaError]:
        return self.cudaMemcpy2DAsync(target, size, source, size, size, 1, kind, stream)

    def cudaMemcpy2DAsync(
        self, target: int, target_pitch: int, source: int, pitch: int, width: int, rows: int, kind: int, stream: Any
    ) -> tuple[CudaError]:
        self.check_stream(stream)

        def work() -> None:
            for row in range(rows):
                places = target + row * target_pitch, source + row * pitch
                for place in places:
                    self.check(place, width)
                ctypes.memmove(*places, width)

        return self.do(work)

    def cudaMemsetAsync(self, address: int, value: int, size: int, stream: Any) -> tuple[CudaError]:
        self.check(address, size)
        return self.do(lambda: ctypes.memset(address, value, size) and None)

    def cudaMemGetInfo(self) -> tuple[CudaError, int, int]:
        used = sum(self.ends[start] - start for start in [*self.blocks] if self.owners[start] == self.current)
        return CudaError.cudaSuccess, self.memory - used, self.memory

    # Device, streams, graphs

    def cudaGetDeviceCount(self) -> tuple[CudaError, int]:
        count = len(self.capabilities)
        return (CudaError.cudaSuccess if count else CudaError.cudaErrorNoDevice), count

    def cudaGetDevice(self) -> tuple[CudaError, int]:
        return CudaError.cudaSuccess, getattr(self.thread, "index", 0)

    def cudaSetDevice(self, index: int) -> tuple[CudaError]:
        if not 0 <= index < len(self.capabilities):
            return (CudaError.cudaErrorInvalidDevice,)
        self.thread.index = index
        self.touched.add(index)
        return (CudaError.cudaSuccess,)

    def cudaGetDeviceProperties(self, index: int) -> tuple[CudaError, Any]:
        major, minor = map(int, self.capabilities[index].split("."))
        named = SimpleNamespace(name=b"Stand-in", major=major, minor=minor, totalGlobalMem=self.memory)
        return CudaError.cudaSuccess, named

    def cudaGetErrorString(self, error: CudaError) -> tuple[CudaError, bytes]:
        return CudaError.cudaSuccess, {100: b"no CUDA-capable device is detected"}.get(int(error), b"an error")

    def cudaStreamCreateWithFlags(self, flags: int) -> tuple[CudaError, int]:
        return CudaError.cudaSuccess, STREAMS + self.current

    def cudaStreamDestroy(self, stream: Any) -> tuple[CudaError]:
        return (CudaError.cudaSuccess,)

    def cudaStreamSynchronize(self, stream: Any) -> tuple[CudaError]:
        self.check_stream(stream)
        assert self.recording is None, "a stream cannot be waited for while it is captured"
        self.synchronized += 1
        self.run(len(self.queue))
        return (CudaError.cudaSuccess,)

    def cudaEventCreateWithFlags(self, flags: int) -> tuple[CudaError, Any]:
        return CudaError.cudaSuccess, SimpleNamespace(after=0)

    def cudaEventRecord(self, event: Any, stream: Any) -> tuple[CudaError]:
        self.check_stream(stream)
        event.after = self.done + len(self.queue)
        return (CudaError.cudaSuccess,)

    def cudaEventSynchronize(self, event: Any) -> tuple[CudaError]:
        self.run(max(0, event.after - self.done))
        return (CudaError.cudaSuccess,)

    def cudaEventDestroy(self, event: Any) -> tuple[CudaError]:
        return (CudaError.cudaSuccess,)

    def cudaStreamBeginCapture(self, stream: Any, mode: Any) -> tuple[CudaError]:
        self.recording = []
        return (CudaError.cudaSuccess,)

    def cudaStreamEndCapture(self, stream: Any) -> tuple[CudaError, Any]:
        graph, self.recording = self.recording, None
        return CudaError.cudaSuccess, graph

    def cudaGraphInstantiate(self, graph: Any, flags: int) -> tuple[CudaError, Any]:
        return CudaError.cudaSuccess, graph

    def cudaGraphLaunch(self, graph: Any, stream: Any) -> tuple[CudaError]:
        self.check_stream(stream)
        self.launched += 1
        for work in graph:
            self.do(work)
        return (CudaError.cudaSuccess,)

    def cudaGraphDestroy(self, graph: Any) -> tuple[CudaError]:
        return (CudaError.cudaSuccess,)

    cudaGraphExecDestroy = cudaGraphDestroy


class Severity(IntEnum):
    INTERNAL_ERROR = 0
    ERROR = 1
    WARNING = 2


class Logger:
    """``tensorrt.ILogger``."""

    Severity = Severity

    def log(self, severity: Severity, message: str) -> None:
        raise NotImplementedError


class TensorRT(ModuleType):
    """``tensorrt``: an engine file is JSON with the keys graph (an ONNX file), inputs, outputs, profiles."""

    ILogger = Logger

    def __init__(self, cuda: Cuda, version: str = "10.9.0.34") -> None:
        super().__init__("tensorrt")
        self.__spec__ = ModuleSpec("tensorrt", None)  # torch looks for it
        self.cuda, self.__version__ = cuda, version
        self.plugins: list[str] = []
        self.refuses_plugin: str | None = None
        if not version.startswith("8."):
            self.ExecutionContextAllocationStrategy = SimpleNamespace(ON_PROFILE_CHANGE=1)
        self.has_own_plugins = False

    def init_libnvinfer_plugins(self, logger: Logger, namespace: str) -> bool:
        self.has_own_plugins = True
        return True

    def get_plugin_registry(self) -> Any:
        def load_library(path: str) -> Any:
            if self.refuses_plugin is not None:
                return None
            self.plugins.append(path)
            return path

        return SimpleNamespace(load_library=load_library)

    def Runtime(self, logger: Logger) -> Any:
        def deserialize_cuda_engine(data: bytes) -> Any:
            assert self.has_own_plugins == self.__version__.startswith("8.")
            assert self.plugins, "an engine with a plugin needs its library first"
            try:
                found = json.loads(data)
                if found["capability"] != self.cuda.capabilities[self.cuda.current]:
                    logger.log(Severity.ERROR, "The engine plan file is generated on an incompatible device")
                    return None
                return Engine(self, logger, found)
            except ValueError:
                logger.log(Severity.ERROR, "Serialization assertion failed.\nmagic tag does not match")
                return None

        return SimpleNamespace(deserialize_cuda_engine=deserialize_cuda_engine, engine_host_code_allowed=False)


class Engine:
    """``ICudaEngine``."""

    def __init__(self, library: TensorRT, logger: Logger, data: dict[str, Any]) -> None:
        self.library, self.logger, self.data = library, logger, data
        self.gpu = library.cuda.current
        options = ort.SessionOptions()
        options.intra_op_num_threads = 1
        options.log_severity_level = 4
        self.session = ort.InferenceSession(data["graph"], options, providers=["CPUExecutionProvider"])
        self.types = {x.name: x.type for x in (*self.session.get_inputs(), *self.session.get_outputs())}
        self.names = [*data["inputs"], *data["outputs"]]
        self.num_io_tensors = len(self.names)
        self.contexts = 0

    def get_tensor_name(self, index: int) -> str:
        return self.names[index]

    def create_execution_context(self, strategy: int | None = None) -> Context:
        assert (strategy is None) == self.library.__version__.startswith("8.")
        assert self.gpu == self.library.cuda.current, "a context is made on another GPU than its engine's"
        self.contexts += 1
        return Context(self, 0 if self.contexts == 1 else -1)


class Context:
    """``IExecutionContext``: runs the ONNX file in onnxruntime, on the memory that was bound."""

    def __init__(self, engine: Engine, profile: int) -> None:
        self.engine = engine
        self.active_optimization_profile = profile
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.addresses: dict[str, int] = {}
        self.ran: tuple[Any, ...] | None = None

    def set_optimization_profile_async(self, index: int, stream: int) -> bool:
        assert index != self.active_optimization_profile, "TensorRT 8 aborts if a profile is set again"
        self.active_optimization_profile = index
        return True

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        assert self.active_optimization_profile >= 0
        least, _, most = self.engine.data["profiles"][self.active_optimization_profile][name]
        if len(shape) != len(least) or not all(a <= x <= b for a, x, b in zip(least, shape, most, strict=True)):
            self.engine.logger.log(Severity.ERROR, f"{name}: {shape} is not in [{least}, {most}]")
            return False
        self.shapes[name] = tuple(shape)
        return True

    def set_tensor_address(self, name: str, address: int) -> bool:
        assert name in self.engine.names
        assert address, "TensorRT takes no null, not even for empty tensors"
        assert address % 256 == 0, "TensorRT wants aligned addresses"
        self.addresses[name] = address
        return True

    def execute_async_v3(self, stream: int) -> bool:
        cuda = self.engine.library.cuda
        cuda.check_stream(stream)
        assert set(self.addresses) == set(self.engine.names)
        assert set(self.shapes) == set(self.engine.data["inputs"])
        shapes, addresses = dict(self.shapes), dict(self.addresses)
        state = (shapes, addresses, self.active_optimization_profile)
        if cuda.recording is not None:
            assert self.ran == state, "TensorRT wants a run with the same shapes before a capture"
        self.ran = state
        cuda.do(lambda: self.execute(shapes, addresses))
        return True

    def execute(self, shapes: dict[str, tuple[int, ...]], addresses: dict[str, int]) -> None:
        engine = self.engine
        binding = engine.session.io_binding()
        for name in engine.data["inputs"]:
            binding.bind_ortvalue_input(name, self._value(name, shapes[name], addresses[name]))
        sizes = self._sizes(shapes)
        for name, dims in engine.data["outputs"].items():
            shape = tuple(_size(dim, sizes) for dim in dims)
            binding.bind_ortvalue_output(name, self._value(name, shape, addresses[name]))
        engine.session.run_with_iobinding(binding)

    def _sizes(self, shapes: dict[str, tuple[int, ...]]) -> dict[Any, int]:
        """Sizes of the dynamic dimensions."""
        found: dict[Any, int] = {}
        for name, dims in self.engine.data["inputs"].items():
            for dim, size in zip(dims, shapes[name], strict=True):
                if isinstance(dim, str):
                    assert found.setdefault(dim, size) == size, f"{dim} is {found[dim]} and, of {name}, {size}"
        return found

    def _value(self, name: str, shape: tuple[int, ...], address: int) -> Any:
        kind = np.dtype(
            {"tensor(float16)": np.float16, "tensor(float)": np.float32, "tensor(int32)": np.int32}[
                self.engine.types[name]
            ]
        )
        size = kind.itemsize * int(np.prod(shape))
        if not size:
            return ort.OrtValue.ortvalue_from_numpy(np.empty(shape, kind))
        self.engine.library.cuda.check(address, size)
        raw = (ctypes.c_uint8 * size).from_address(address)
        return ort.OrtValue.ortvalue_from_numpy(np.frombuffer(raw, np.uint8).view(kind).reshape(shape))


def _size(dim: int | str, sizes: Mapping[Any, int]) -> int:
    """Of a dimension such as 5, ``P`` or ``640*P``."""
    if isinstance(dim, int):
        return dim
    factor, _, symbol = dim.rpartition("*")
    return int(factor or 1) * sizes[symbol]


def make_engines(
    bundle: Path,
    limits: Limits,
    *,
    capability: str = "9.0",
    version: str = "10.9.0.34",
    empty_visual_index: bool = True,
    backend: str = "tensorrt",
) -> Path:
    """Write an engine directory into a bundle, whose engines the stand-in can load."""
    manifest = Manifest.load(bundle)
    profiles = build_profiles(manifest, limits, empty_indices=empty_visual_index)
    directory = bundle / FOLDER / directory_name(backend, [capability])
    directory.mkdir(parents=True, exist_ok=True)
    for name in (DECODER, VISION):
        graph = manifest.graphs[name]
        data = {
            "graph": str((bundle / graph.file).resolve()),
            "inputs": {tensor.name: tensor.shape for tensor in graph.inputs},
            "outputs": {tensor.name: tensor.shape for tensor in graph.outputs},
            "profiles": [profile.shapes for profile in profiles if profile.engine == name],
            "capability": capability,
        }
        (directory / f"{name}.engine").write_text(json.dumps(data))
    (directory / "libvkvx_tensorrt.so").write_bytes(b"a plugin")
    files = {
        path.name: FileInfo(path.stat().st_size, sha256(path)) for path in directory.iterdir() if path.name != FILE_NAME
    }
    EngineManifest(
        vkvx_version=manifest.vkvx_version,
        operator_version=manifest.operator_version,
        backend=backend,
        library_version=version,
        compute_capabilities=(capability,),
        bundle_hash=bundle_hash(bundle),
        plugin=PluginInfo("libvkvx_tensorrt.so", files["libvkvx_tensorrt.so"].sha256, False),
        limits=limits,
        empty_visual_index=empty_visual_index,
        engines={name: EngineInfo(f"{name}.engine", 0, 0) for name in (DECODER, VISION)},
        profiles=profiles,
        tensors=tuple(
            EngineTensor(tensor.name, kind, tensor.dtype, tensor.shape, name)
            for name in (DECODER, VISION)
            for kind in ("input", "output")
            for tensor in getattr(manifest.graphs[name], f"{kind}s")
        ),
        aliases={
            tensor.name: tensor.name.replace("present", "past")
            for tensor in manifest.graphs[DECODER].outputs
            if tensor.name.startswith("present.")
        },
        files=files,
        options={},
        cache_key="",
    ).save(directory)
    return directory


def install_cuda(monkeypatch: pytest.MonkeyPatch, cuda: Cuda) -> Cuda:
    bindings = ModuleType("cuda.bindings")
    bindings.runtime = cuda  # type: ignore[attr-defined]
    top = ModuleType("cuda")
    top.bindings = bindings  # type: ignore[attr-defined]
    top.__spec__ = ModuleSpec("cuda", None)
    for name, module in (("cuda", top), ("cuda.bindings", bindings), ("cuda.bindings.runtime", cuda)):
        monkeypatch.setitem(sys.modules, name, module)
    return cuda


def install_tensorrt(monkeypatch: pytest.MonkeyPatch, cuda: Cuda, version: str = "10.9.0.34") -> TensorRT:
    library = TensorRT(cuda, version)
    kernels = SamplingLibrary(cuda)
    monkeypatch.setattr(tensorrt_sampling, "open_kernels", lambda *_: kernels)
    monkeypatch.setitem(sys.modules, "tensorrt", library)
    monkeypatch.setattr(tensorrt_engine, "_loaded_plugins", {})
    return library
