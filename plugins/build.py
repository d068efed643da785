"""Builds ``libvkvx``, the TensorRT plugins and the operator of onnxruntime with CMake and nvcc; finds what was built.

A build is kept in a folder named by the hash of its sources, so that a changed source or another set of architectures
never meets an old library. The variables of ``OVERRIDES`` name libraries to use instead.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import importlib.util
import os
import re
import shutil
import signal
import subprocess
import tempfile
from collections.abc import Collection, Iterator
from pathlib import Path

from vkvx.errors import DependencyError, OptionError, StorageError

SOURCES = Path(__file__).parent / "csrc"
LIBRARY = "libvkvx.so"
TENSORRT = "libvkvx_tensorrt.so"
"""The plugin of TensorRT 10.3 and newer, TensorRT 11 and TensorRT for RTX."""
TENSORRT8 = "libvkvx_tensorrt8.so"
"""The plugin of TensorRT 8.6."""
ONNXRUNTIME = "libvkvx_onnxruntime.so"
"""The custom operator of onnxruntime's CUDA provider."""
KERNELS = "libvkvx_kernels.a"
OVERRIDES = {
    LIBRARY: "VKVX_LIBRARY",
    TENSORRT: "VKVX_TENSORRT_LIBRARY",
    TENSORRT8: "VKVX_TENSORRT8_LIBRARY",
    ONNXRUNTIME: "VKVX_ONNXRUNTIME_LIBRARY",
}
CACHE = "VKVX_CACHE"
HEADERS = "TENSORRT_ROOT"
NO_HEADERS = (
    f"the headers of TensorRT are missing; set {HEADERS} to the folder of TensorRT, install its development package, "
    "or `pip install --no-deps kernel-lens`, which holds them"
)
ARCHITECTURES = ("75", "80", "86", "89", "90", "100", "120")
"""Compute capabilities, without the dot, that ``all`` stands for."""
_PATTERNS = ("CMakeLists.txt", "*.h", "*.cpp", "kernels/*.cuh", "launch/*", "tensorrt/*", "onnxruntime/*")
_SYSTEM_FOLDERS = (
    *(f"/usr/include/{machine}-linux-gnu" for machine in ("x86_64", "aarch64")),
    *("/usr/include", "/usr/local/include", "/usr/local/tensorrt/include", "/opt/tensorrt/include"),
)


def cache_folder() -> Path:
    """Where builds are kept: ``$VKVX_CACHE``, else ``vkvx`` in the user's cache folder."""
    if given := os.environ.get(CACHE):
        return Path(given)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "vkvx"


def source_files() -> list[Path]:
    """Everything that a build reads from this folder."""
    return sorted(path for pattern in _PATTERNS for path in SOURCES.glob(pattern))


def source_hash() -> str:
    """Hash of the source files; 16 hexadecimal digits."""
    digest = hashlib.sha256()
    for path in source_files():
        digest.update(path.name.encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()[:16]


def native_architectures() -> list[str]:
    """Compute capabilities of the GPUs that the driver shows, without the dot; empty without a GPU."""
    program = shutil.which("nvidia-smi")
    if program is None:
        return []
    done = subprocess.run(
        [program, "--query-gpu=compute_cap", "--format=csv,noheader"], capture_output=True, text=True, check=False
    )
    found = re.findall(r"^(\d+)\.(\d)$", done.stdout, re.MULTILINE) if done.returncode == 0 else []
    return sorted({major + minor for major, minor in found}, key=int)


def resolve_architectures(given: str) -> list[str]:
    """``native``, ``all``, or a list such as ``80,90`` to compute capabilities; OptionError for anything else.

    ``native`` without a GPU means ``all``.
    """
    if given == "all":
        return list(ARCHITECTURES)
    if given == "native":
        return native_architectures() or list(ARCHITECTURES)
    chosen = [part.strip().replace(".", "") for part in given.split(",")]
    if not all(re.fullmatch(r"\d{2,3}", part) and int(part) >= 75 for part in chosen):
        raise OptionError(f"architectures '{given}' are not understood: give native, all, or a list such as 80,90")
    return sorted(set(chosen), key=int)


def find_library(name: str = LIBRARY, architectures: Collection[str] = ()) -> Path | None:
    """The library to load: the one that its variable in ``OVERRIDES`` names, else the newest build of these sources.

    Only builds for all of ``architectures`` (compute capabilities without the dot) count. None if there is none.
    Raises DependencyError if the variable names no file.
    """
    override = OVERRIDES[name]
    if given := os.environ.get(override):
        if not Path(given).is_file():
            raise DependencyError(f"{override} names {given}, which is no file; unset it or give the path of {name}")
        return Path(given)
    builds = [
        path
        for path in cache_folder().glob(f"{source_hash()}-*/{name}")
        if path.is_file() and set(architectures) <= set(path.parent.name.split("-")[1:])
    ]
    return max(builds, key=lambda path: path.stat().st_mtime, default=None)


def find_headers(given: str | os.PathLike[str] | None = None) -> Path | None:
    """The folder of ``NvInferRuntime.h``: under the given folder, else ``$TENSORRT_ROOT``, the system's, kernel-lens.

    The pip package kernel-lens holds the headers of TensorRT 10. None if there are none.
    Raises DependencyError if the folder that was given, or ``$TENSORRT_ROOT``, has none.
    """
    named = given or os.environ.get(HEADERS)
    if named:
        root = Path(named)
        folders = (root, root / "include", *(root / "include" / f"{m}-linux-gnu" for m in ("x86_64", "aarch64")))
    else:
        spec = importlib.util.find_spec("kernel_lens")
        packages = spec.submodule_search_locations or [] if spec else []
        folders = (*map(Path, _SYSTEM_FOLDERS), *(Path(folder) / "include" / "tensorrt" for folder in packages))
    found = next((folder for folder in folders if (folder / "NvInferRuntime.h").is_file()), None)
    if named and found is None:
        source = "--tensorrt-headers" if given else HEADERS
        raise DependencyError(f"{source} names {named}, which has no NvInferRuntime.h; give the folder of TensorRT")
    return found


def plugin_of(headers: Path) -> str:
    """File name of the plugin that is built with these headers; DependencyError for versions without one."""
    text = (headers / "NvInferVersion.h").read_text()
    major, minor = (
        re.search(rf"define (?:NV_TENSORRT|TRT)_{part}(_[A-Z]+)? +(\d+)", text) for part in ("MAJOR", "MINOR")
    )
    if not (major and minor):
        raise DependencyError(f"{headers / 'NvInferVersion.h'} names no version; give the folder of TensorRT's headers")
    version = int(major[2]), int(minor[2])
    if major[1] == "_RTX" or version >= (10, 3):
        return TENSORRT
    if version[0] == 8 and version >= (8, 6):
        return TENSORRT8
    raise DependencyError(
        f"{headers} has the headers of TensorRT {version[0]}.{version[1]}; give those of 8.6, or of 10.3 or newer"
    )


def build(architectures: str = "native", *, force: bool = False, jobs: int | None = None) -> Path:
    """Build the library unless these sources were built for these architectures before; returns its path.

    Args:
        architectures: see :func:`resolve_architectures`.
        force: build even if there is such a build.
        jobs: compilers that run side by side; default: as many as there are cores.

    Raises:
        DependencyError: without nvcc or CMake, or if the compiler refuses the sources.
        OptionError: for architectures that are not understood or that nvcc does not know, and fewer than 1 job.
        StorageError: if the cache folder cannot be written.
    """
    chosen = resolve_architectures(architectures)
    if jobs is not None and jobs < 1:
        raise OptionError(f"jobs= (--jobs) {jobs} is not supported: give at least 1")
    definitions = {"CMAKE_CUDA_ARCHITECTURES": ";".join(chosen)}
    return _build(_folder(chosen), (KERNELS, LIBRARY), definitions, force, jobs)


def build_plugin(
    architectures: str = "native", headers: Path | None = None, *, force: bool = False, jobs: int | None = None
) -> Path:
    """Build the TensorRT plugin of these headers, and :func:`build` what it links; returns its path.

    Args:
        architectures, jobs: see :func:`build`.
        force: build the plugin even if there is one; the kernels are kept.
        headers: what :func:`find_headers` found; default: call it.

    Raises:
        DependencyError: also if there are no headers.
    """
    headers = headers or find_headers()
    if headers is None:
        raise DependencyError(NO_HEADERS)
    name = plugin_of(headers)
    folder = _folder(resolve_architectures(architectures))
    kernels = build(architectures, jobs=jobs).with_name(KERNELS)
    definitions = {"VKVX_KERNELS": str(kernels), "VKVX_TENSORRT_HEADERS": str(headers.absolute())}
    return _build(folder, (name,), definitions, force, jobs)


def build_onnxruntime(architectures: str = "native", *, force: bool = False, jobs: int | None = None) -> Path:
    """Build the custom operator of onnxruntime, and :func:`build` what it links; returns its path.

    It needs no headers of onnxruntime. Arguments and errors are those of :func:`build_plugin`.
    """
    folder = _folder(resolve_architectures(architectures))
    kernels = build(architectures, jobs=jobs).with_name(KERNELS)
    definitions = {"VKVX_KERNELS": str(kernels), "VKVX_ONNXRUNTIME": "ON"}
    return _build(folder, (ONNXRUNTIME,), definitions, force, jobs)


def _folder(architectures: list[str]) -> Path:
    return cache_folder() / f"{source_hash()}-{'-'.join(architectures)}"


def _build(target: Path, names: tuple[str, ...], definitions: dict[str, str], force: bool, jobs: int | None) -> Path:
    """Run CMake with the definitions and move the files of these names to the folder; the path of the last one."""
    path = target / names[-1]
    if path.is_file() and not force:
        return path
    nvcc, cmake = _nvcc(), shutil.which("cmake")
    if cmake is None:
        raise DependencyError("CMake is missing; install it, for example with `pip install cmake`")
    _check_architectures(nvcc, target.name.split("-")[1:])
    with contextlib.ExitStack() as stack:
        try:
            target.mkdir(parents=True, exist_ok=True)
            stack.enter_context(_locked(target))
            folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="build-", dir=cache_folder()))
        except OSError as error:
            raise StorageError(
                f"cannot write to {target}: {error.strerror}; name another folder with {CACHE}"
            ) from error
        if path.is_file() and not force:  # another process built it meanwhile
            return path
        definitions = {**definitions, "CMAKE_CUDA_COMPILER": nvcc, "CUDAToolkit_ROOT": str(Path(nvcc).parent.parent)}
        _run([cmake, "-S", str(SOURCES), "-B", folder, *(f"-D{name}={value}" for name, value in definitions.items())])
        _run([cmake, "--build", folder, "--parallel", str(jobs or os.cpu_count() or 1)])
        for name in names:
            os.replace(Path(folder) / name, target / name)
    return path


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """While it runs, no other process is in here for the same folder."""
    with (folder / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _nvcc() -> str:
    candidates = [shutil.which("nvcc")]
    candidates += [
        str(Path(root) / "bin" / "nvcc") for root in (os.environ.get("CUDA_HOME"), "/usr/local/cuda") if root
    ]
    for candidate in candidates:
        if candidate and Path(candidate).is_file():
            return candidate
    raise DependencyError("the CUDA compiler nvcc is missing; install the CUDA toolkit, or set CUDA_HOME to its folder")


def _check_architectures(nvcc: str, architectures: Collection[str]) -> None:
    """Raise OptionError for compute capabilities that the compiler does not name when it is asked for its own."""
    try:
        done = subprocess.run([nvcc, "--list-gpu-arch"], capture_output=True, text=True, check=False)
    except OSError as error:
        raise DependencyError(f"{nvcc} cannot be run ({error.strerror}); install the CUDA toolkit again") from error
    known = sorted(re.findall(r"^compute_(\d+)$", done.stdout, re.MULTILINE), key=int)
    unknown = [name for name in architectures if name not in known]
    if known and unknown:
        raise OptionError(
            f"{nvcc} does not know compute capability {', '.join(unknown)}; give --arch some of {', '.join(known)}, or "
            "install a newer CUDA toolkit"
        )


def _run(command: list[str]) -> None:
    """Run a program. It is the leader of a group of its own, so that what it has started ends with it."""
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True
    ) as process:
        try:
            output, _ = process.communicate()
        except BaseException:  # Ctrl-C, or a signal that ends like it
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            raise
    if process.returncode:
        errors = [line.strip() for line in output.splitlines() if re.search(r"\berror\b", line, re.IGNORECASE)]
        reason = errors[0] if errors else output.strip().splitlines()[-1] if output.strip() else "no output"
        raise DependencyError(f"`{Path(command[0]).name}` failed to build the library: {reason}")
