"""Which engines of a bundle this machine can run, and on which of its GPUs. Loads neither TensorRT nor an engine."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from vkvx.errors import EngineError, VkvxError
from vkvx.runtime.engines.gpus import Gpu, capabilities, find_gpus
from vkvx.runtime.engines.manifest import BACKENDS, EngineManifest, engine_directories


@dataclass(frozen=True)
class Found:
    """An engine directory, its manifest, and the GPU that it was built for."""

    directory: Path
    manifest: EngineManifest
    gpu: Gpu


def find_engines(bundle: Path) -> dict[str, Found | VkvxError]:
    """For each backend that the bundle has engines of those to use, on the first GPU that they are for, or what is
    wrong: a DependencyError or DeviceError without a usable GPU, else an EngineError that names every directory."""
    loaded = {directory: _load(bundle, directory) for directory in engine_directories(bundle)}
    if not loaded:
        return {}
    gpus: list[Gpu] | VkvxError
    try:
        gpus = find_gpus()
    except VkvxError as error:
        gpus = error
    found: dict[str, Found | VkvxError] = {}
    for name in BACKENDS:
        own = {directory: one for directory, one in loaded.items() if _backend(directory, one) == name}
        if own:
            found[name] = _choose(bundle, name, own, gpus) if isinstance(gpus, list) else gpus
    return found


def _load(bundle: Path, directory: Path) -> EngineManifest | EngineError:
    try:
        manifest = EngineManifest.load(directory)
        manifest.check_bundle(bundle)
    except EngineError as error:
        return error
    return manifest


def _backend(directory: Path, loaded: EngineManifest | EngineError) -> str:
    """By the manifest; where it cannot be read, by the directory's name."""
    return loaded.backend if isinstance(loaded, EngineManifest) else directory.name.partition("-")[0]


def _choose(
    bundle: Path, name: str, own: dict[Path, EngineManifest | EngineError], gpus: list[Gpu]
) -> Found | EngineError:
    reasons = []
    for gpu in gpus:
        for directory, one in own.items():
            if isinstance(one, EngineManifest) and gpu.compute_capability in one.compute_capabilities:
                return Found(directory, one, gpu)
    here = " and ".join(capabilities(gpus))
    for directory, one in own.items():
        if isinstance(one, EngineError):
            reasons.append(str(one).partition(";")[0])
        else:
            built = ", ".join(one.compute_capabilities)
            reasons.append(f"{directory.name} is for compute capability {built}, the machine has {here}")
    return EngineError(
        f"none of the engines of '{name}' in {bundle} can be used: {', and '.join(reasons)}; run "
        f"`vkvx build {bundle} --backend {name}` on this machine"
    )
