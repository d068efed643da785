"""Builds ``libvkvx`` with CMake and nvcc, and finds the one that was built.

A build is kept in a folder named by the hash of its sources, so that a changed source or another set of architectures
never meets an old library. ``VKVX_LIBRARY`` names a library to use instead.
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import subprocess
import tempfile
from pathlib import Path

from vkvx.errors import DependencyError, OptionError, StorageError

SOURCES = Path(__file__).parent
LIBRARY = "libvkvx.so"
OVERRIDE = "VKVX_LIBRARY"
CACHE = "VKVX_CACHE"
ARCHITECTURES = ("75", "80", "86", "89", "90", "100", "120")
"""Compute capabilities, without the dot, that ``all`` stands for."""
_PATTERNS = ("CMakeLists.txt", "vkvx.h", "kernels/*.cuh", "source/*")


def cache_folder() -> Path:
    """Where builds are kept: ``$VKVX_CACHE``, else ``vkvx`` in the user's cache folder."""
    if given := os.environ.get(CACHE):
        return Path(given)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "vkvx"


def source_hash() -> str:
    """Hash of everything that a build reads from this folder; 16 hexadecimal digits."""
    digest = hashlib.sha256()
    for path in sorted(path for pattern in _PATTERNS for path in SOURCES.glob(pattern)):
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


def find_library() -> Path | None:
    """The library to load: ``$VKVX_LIBRARY``, else the newest build of these sources; None if there is none.

    Raises DependencyError if ``$VKVX_LIBRARY`` names no file.
    """
    if given := os.environ.get(OVERRIDE):
        if not Path(given).is_file():
            raise DependencyError(f"{OVERRIDE} names {given}, which is no file; unset it or give the path of {LIBRARY}")
        return Path(given)
    builds = [path for path in cache_folder().glob(f"{source_hash()}-*/{LIBRARY}") if path.is_file()]
    return max(builds, key=lambda path: path.stat().st_mtime, default=None)


def build(architectures: str = "native", *, force: bool = False, jobs: int | None = None) -> Path:
    """Build the library unless these sources were built for these architectures before; returns its path.

    Args:
        architectures: see :func:`resolve_architectures`.
        force: build even if there is such a build.
        jobs: compilers that run side by side; default: as many as there are cores.

    Raises:
        DependencyError: without nvcc or CMake, or if the compiler refuses the sources.
        OptionError: for architectures that are not understood.
        StorageError: if the cache folder cannot be written.
    """
    chosen = resolve_architectures(architectures)
    target = cache_folder() / f"{source_hash()}-{'-'.join(chosen)}" / LIBRARY
    if target.is_file() and not force:
        return target
    nvcc, cmake = _nvcc(), shutil.which("cmake")
    if cmake is None:
        raise DependencyError("CMake is missing; install it, for example with `pip install cmake`")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        folder = tempfile.mkdtemp(prefix="build-", dir=cache_folder())
    except OSError as error:
        raise StorageError(
            f"cannot write to {target.parent}: {error.strerror}; name another folder with {CACHE}"
        ) from error
    try:
        definitions = {"CMAKE_CUDA_ARCHITECTURES": ";".join(chosen), "CMAKE_CUDA_COMPILER": nvcc}
        arguments = [f"-D{name}={value}" for name, value in definitions.items()]
        _run([cmake, "-S", str(SOURCES), "-B", folder, *arguments])
        _run([cmake, "--build", folder, "--parallel", str(jobs or os.cpu_count() or 1)])
        os.replace(Path(folder) / LIBRARY, target)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    return target


def _nvcc() -> str:
    candidates = [shutil.which("nvcc")]
    candidates += [
        str(Path(root) / "bin" / "nvcc") for root in (os.environ.get("CUDA_HOME"), "/usr/local/cuda") if root
    ]
    for candidate in candidates:
        if candidate and Path(candidate).is_file():
            return candidate
    raise DependencyError("the CUDA compiler nvcc is missing; install the CUDA toolkit, or set CUDA_HOME to its folder")


def _run(command: list[str]) -> None:
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False)
    if done.returncode:
        errors = [line.strip() for line in done.stdout.splitlines() if re.search(r"\berror\b", line, re.IGNORECASE)]
        reason = errors[0] if errors else done.stdout.strip().splitlines()[-1] if done.stdout.strip() else "no output"
        raise DependencyError(f"`{Path(command[0]).name}` failed to build {LIBRARY}: {reason}")
