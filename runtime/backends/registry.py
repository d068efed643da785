"""Which backends there are, which of them suits a bundle on this machine, and how one is opened."""

from __future__ import annotations

from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from vkvx.errors import EngineError, OptionError, VkvxError
from vkvx.manifest import Manifest
from vkvx.models.checkpoint import CONFIG_FILE
from vkvx.packages import missing
from vkvx.plugins.build import find_library
from vkvx.plugins.library import MAX_HEAD_DIM
from vkvx.runtime.backends.base import Backend
from vkvx.runtime.engines.manifest import BACKENDS as ENGINE_BACKENDS
from vkvx.runtime.engines.manifest import Limits, engine_directories

_HOMES = {
    "onnxruntime": ("vkvx.runtime.backends.onnxruntime.backend", "OnnxRuntimeBackend"),
    "torch": ("vkvx.runtime.backends.torch.loading", "open_bundle"),
    "tensorrt": ("vkvx.runtime.backends.tensorrt.backend", "open_tensorrt"),
    "rtx": ("vkvx.runtime.backends.tensorrt.backend", "open_rtx"),
}
"""Module and function that opens a bundle, by name of the backend; imported when it is chosen."""
BACKENDS = tuple(_HOMES)


def open_backend(
    name: str,
    bundle: Path,
    manifest: Manifest,
    *,
    slots: int,
    visual_tokens: int,
    text_tokens: int,
    provider: str = "auto",
    threads: int | None = None,
    verify: bool = True,
) -> Backend:
    """Open a bundle in a backend by name.

    ``verify`` has an effect on engines only: their files are compared with their SHA-256, and they have to reproduce
    the golden sample. Raises OptionError, DependencyError, BundleError, EngineError, CapacityError.
    """
    if name not in BACKENDS:
        raise OptionError(f"unknown backend '{name}' (--backend): give one of auto, {', '.join(BACKENDS)}")
    module, function = _HOMES[name]
    try:
        opener = getattr(import_module(module), function)
    except ModuleNotFoundError as error:
        raise missing(error.name or name) from error
    options: dict[str, Any] = {"provider": provider, "threads": threads}
    if name in ENGINE_BACKENDS:
        options["verify"] = verify
    return opener(bundle, manifest, slots=slots, visual_tokens=visual_tokens, text_tokens=text_tokens, **options)


def choose_backend(
    bundle: Path, manifest: Manifest, provider: str = "auto", threads: int | None = None
) -> tuple[str, str]:
    """The backend that serves a bundle best on this machine, and why: an engine built for the GPU; torch on a GPU with
    ``libvkvx``; or onnxruntime.

    TensorRT and torch are loaded only where everything else speaks for them.
    """
    if provider == "cpu":
        return "onnxruntime", "the CPU was asked for"
    if threads is not None:
        return "onnxruntime", "a number of CPU threads was asked for"
    engine, against = _engines_for(bundle)
    if engine is not None:
        return engine, "the bundle has engines for this GPU"
    reasons = [against] if against else []
    against = _against_torch(bundle, manifest)
    if against is None:
        return "torch", "; ".join([*reasons, "there is a GPU, and libvkvx is built"])
    return "onnxruntime", "; ".join([*reasons, against])


def engine_limits(bundle: Path, backend: str) -> Limits:
    """The most that the engines of a bundle take on the GPU of this machine. Raises DependencyError, EngineError."""
    from vkvx.runtime.backends.tensorrt.device import Device
    from vkvx.runtime.backends.tensorrt.engine import find_engines

    return find_engines(bundle, backend, Device().compute_capability)[1].limits


def _engines_for(bundle: Path) -> tuple[str | None, str | None]:
    """The backend whose engines this machine can run; else why not, or nothing if there are no engines."""
    if not engine_directories(bundle):
        return None, None
    if find_spec("cuda") is None:
        return None, "its engines need cuda-python"
    from vkvx.runtime.backends.tensorrt.device import Device
    from vkvx.runtime.backends.tensorrt.engine import find_engines
    from vkvx.runtime.engines.library import MODULES

    try:
        capability = Device().compute_capability
    except VkvxError as error:
        return None, str(error).partition(";")[0]
    reason = f"its engines are not for compute capability {capability}"
    for name in ENGINE_BACKENDS:
        try:
            find_engines(bundle, name, capability)
        except EngineError:
            continue
        if find_spec(MODULES[name]) is not None:
            return name, None
        reason = f"its engines need the Python module {MODULES[name]}"
    return None, reason


def _against_torch(bundle: Path, manifest: Manifest) -> str | None:
    if find_library() is None:
        return "libvkvx is not built (vkvx plugin build)"
    if manifest.model.head_dim > MAX_HEAD_DIM:
        return f"libvkvx has no kernel for heads of {manifest.model.head_dim}"
    if CONFIG_FILE not in manifest.files:
        return "the bundle holds no config.json, which older exports left out"
    absent = next((name for name in ("torch", "transformers", "safetensors") if find_spec(name) is None), None)
    if absent is not None:
        return f"{absent} is not installed"
    try:
        import torch
    except (ImportError, OSError) as error:  # a package without the libraries that it needs
        return f"torch cannot be imported ({error})"
    return None if torch.cuda.is_available() else "torch finds no GPU"
