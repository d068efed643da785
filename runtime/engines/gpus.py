"""The NVIDIA GPUs of this machine, numbered as CUDA numbers them."""

from __future__ import annotations

import re
import shutil
import subprocess
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from vkvx.errors import DependencyError, DeviceError
from vkvx.packages import missing


@dataclass(frozen=True)
class Gpu:
    """A GPU: CUDA's index, name, compute capability such as "9.0", bytes of memory."""

    index: int
    name: str
    compute_capability: str
    memory: int

    def __str__(self) -> str:
        return f"{self.name} (GPU {self.index})"


def load_cuda() -> Any:
    """The module ``cuda.bindings.runtime``. Raises DependencyError without cuda-python 12 or 13."""
    try:
        from cuda.bindings import runtime
    except ImportError as error:
        raise missing("cuda", error) from error
    return runtime


def error_text(cuda: Any, error: Any) -> str:
    """What CUDA says about an error code."""
    words = cuda.cudaGetErrorString(error)[1]
    return words.decode() if isinstance(words, bytes) else str(words)


def find_gpus() -> list[Gpu]:
    """The GPUs that this process may use, at least one; none of them is touched.

    Raises DependencyError without cuda-python, a driver, or a GPU.
    """
    cuda = load_cuda()
    error, count = cuda.cudaGetDeviceCount()
    failed = error != cuda.cudaError_t.cudaSuccess
    if failed or not count:
        reason = error_text(cuda, error) if failed else "the driver shows none"
        raise DependencyError(
            f"no NVIDIA GPU can be used ({reason}); check `nvidia-smi` and the driver, or run the bundle with "
            "backend='onnxruntime' (--backend onnxruntime)"
        )
    found = []
    for index in range(count):
        error, properties = cuda.cudaGetDeviceProperties(index)
        if error != cuda.cudaError_t.cudaSuccess:
            raise DeviceError(f"CUDA does not describe GPU {index} ({error_text(cuda, error)}); see `nvidia-smi`")
        name = properties.name.decode() if isinstance(properties.name, bytes) else str(properties.name)
        capability = f"{properties.major}.{properties.minor}"
        found.append(Gpu(index, name, capability, int(properties.totalGlobalMem)))
    return found


def list_gpus() -> list[Gpu]:
    """Like :func:`find_gpus`, but empty without a GPU; without cuda-python those that ``nvidia-smi`` shows."""
    try:
        load_cuda()
    except DependencyError:
        return _ask_driver()
    try:
        return find_gpus()
    except DependencyError:
        return []


def capabilities(gpus: Iterable[Gpu]) -> list[str]:
    """The compute capabilities of GPUs, each once, in their order."""
    return list(dict.fromkeys(gpu.compute_capability for gpu in gpus))


def use_gpu(gpu: Gpu, cuda: Any = None) -> None:
    """Make a GPU the current one of the calling thread: CUDA keeps that for each thread, and TensorRT follows it.

    ``cuda`` is what :func:`load_cuda` gave, for callers in a hurry. Raises DependencyError without cuda-python,
    DeviceError if CUDA refuses.
    """
    cuda = cuda or load_cuda()
    error, current = cuda.cudaGetDevice()
    if current != gpu.index:  # while a stream is captured, nothing is set that is set already
        (error,) = cuda.cudaSetDevice(gpu.index)
    if error != cuda.cudaError_t.cudaSuccess:
        raise DeviceError(f"CUDA cannot use {gpu} ({error_text(cuda, error)}); see `vkvx doctor`")


def _ask_driver() -> list[Gpu]:
    program = shutil.which("nvidia-smi")
    if program is None:
        return []
    command = [program, "--query-gpu=compute_cap,memory.total,name", "--format=csv,noheader,nounits"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return []
    lines = re.findall(r"^(\d+\.\d), (\d+), (.+)$", done.stdout, re.MULTILINE) if done.returncode == 0 else []
    return [Gpu(i, name, capability, int(size) << 20) for i, (capability, size, name) in enumerate(lines)]
