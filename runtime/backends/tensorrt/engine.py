"""Opens the engines of a bundle: finds the directory, checks what it was built for, loads plugin and engine files.

TensorRT 8.6, 10, 11 and TensorRT for RTX share this code. Nothing here imports torch, transformers or onnx.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vkvx.errors import EngineError
from vkvx.manifest import Progress
from vkvx.runtime.backends.tensorrt.device import Device
from vkvx.runtime.backends.tensorrt.log import Log
from vkvx.runtime.engines.library import load
from vkvx.runtime.engines.manifest import DECODER, VISION, EngineManifest, engine_directories

_loaded_plugins: dict[str, str] = {}
"""SHA-256 of each plugin library that this process has loaded, by the TensorRT module it was registered with: a
registry takes no plugin twice."""


@dataclass(frozen=True)
class Engines:
    """The engines of a bundle, ready for contexts."""

    directory: Path
    manifest: EngineManifest
    library: Any
    log: Log
    runtime: Any
    decoder: Any
    vision: Any

    def context(self, engine: Any, profile: int, device: Device) -> Any:
        """A new execution context with a profile. It has memory of its own: as much as the profile needs, or, before
        TensorRT 10, the largest one."""
        strategies = getattr(self.library, "ExecutionContextAllocationStrategy", None)
        with self.log.explain(EngineError, f"TensorRT makes no context for {self.directory}"):
            if strategies is None:
                context = engine.create_execution_context()
            else:
                context = engine.create_execution_context(strategies.ON_PROFILE_CHANGE)
            self.log.require(context is not None)
            # A first context has profile 0 already. To give it that again ends the process in TensorRT 8, where an
            # engine has compiled regions.
            if context.active_optimization_profile != profile:
                self.log.require(context.set_optimization_profile_async(profile, int(device.stream)))
        device.synchronize()
        return context


def find_engines(bundle: Path, backend: str, compute_capability: str) -> tuple[Path, EngineManifest]:
    """The engine directory of a bundle for a backend and a GPU. Raises EngineError that says what there is."""
    found = []
    for directory in engine_directories(bundle):
        manifest = EngineManifest.load(directory)
        if manifest.backend != backend:
            continue
        if compute_capability in manifest.compute_capabilities:
            return directory, manifest
        found.append(directory.name)
    there = f"there are {', '.join(found)}" if found else "there are none for this backend"
    raise EngineError(
        f"{bundle} has no engines of '{backend}' for compute capability {compute_capability}: {there}; run "
        f"`vkvx build {bundle} --backend {backend}` on this machine"
    )


def open_engines(
    bundle: Path, backend: str, device: Device, *, verify: bool = True, progress: Progress | None = None
) -> Engines:
    """Load the engines of a bundle for this GPU.

    ``verify`` compares the SHA-256 of all files; that of the plugin library, whose code is run, is always compared.
    Raises EngineError (none for this GPU, of another bundle, damaged, built by another TensorRT), DependencyError
    (no TensorRT), CapacityError (too little GPU memory).
    """
    directory, manifest = find_engines(bundle, backend, device.compute_capability)
    manifest.check_bundle(bundle)
    loaded = load(backend, has_gpu=True)
    check_version(manifest, loaded.version, directory)
    library = loaded.module
    if verify:
        manifest.verify(directory, progress)
    log = Log(library)
    if not hasattr(library, "ExecutionContextAllocationStrategy"):  # before TensorRT 10 some layers are plugins
        library.init_libnvinfer_plugins(log.logger, "")
    load_plugin(library, manifest, directory, log)
    runtime = library.Runtime(log.logger)
    if manifest.options.get("version_compatible"):
        runtime.engine_host_code_allowed = True
    decoder = _deserialize(runtime, directory / manifest.engines[DECODER].file, log)
    vision = _deserialize(runtime, directory / manifest.engines[VISION].file, log)
    for name, engine in ((DECODER, decoder), (VISION, vision)):
        _check_tensors(name, engine, manifest, directory)
    return Engines(directory, manifest, library, log, runtime, decoder, vision)


def check_version(manifest: EngineManifest, version: str, directory: Path) -> None:
    """Raise EngineError unless this TensorRT can load engines that were built by the manifest's."""
    built = manifest.library_version
    if version == built:
        return
    parts, others = version.split("."), built.split(".")
    later = [int(x) for x in parts[:3]] >= [int(x) for x in others[:3]]
    if manifest.options.get("version_compatible") and parts[0] == others[0] and later:
        return
    raise EngineError(
        f"{directory} was built by TensorRT {built}, this one is {version}; install that version, or run "
        "`vkvx build BUNDLE --force` (with --version-compatible, later releases of one major version work as well)"
    )


def load_plugin(library: Any, manifest: EngineManifest, directory: Path, log: Log) -> None:
    """Register the plugin library of an engine directory, if it has one. Raises EngineError if it is not what was
    built, or another one is loaded already."""
    plugin = manifest.plugin
    if plugin is None or plugin.embedded:
        return
    path = directory / plugin.file
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    if digest != plugin.sha256:
        raise EngineError(
            f"{path} is not the plugin that the engines were built with (SHA-256 {digest[:12]}..., expected "
            f"{plugin.sha256[:12]}...); run `vkvx build BUNDLE --force`"
        )
    loaded = _loaded_plugins.get(library.__name__)
    if loaded == digest:
        return
    if loaded is not None:
        raise EngineError(
            f"this process has loaded another plugin than {path}; open these engines in a process of their own, or "
            "build all engines with one vkvx"
        )
    with log.explain(EngineError, f"TensorRT cannot load the plugin {path}"):
        log.require(library.get_plugin_registry().load_library(str(path)) is not None)
    _loaded_plugins[library.__name__] = digest


def _deserialize(runtime: Any, path: Path, log: Log) -> Any:
    with log.explain(EngineError, f"TensorRT cannot load {path}", "run `vkvx build BUNDLE --force`"):
        engine = runtime.deserialize_cuda_engine(path.read_bytes())
        log.require(engine is not None)
    return engine


def _check_tensors(name: str, engine: Any, manifest: EngineManifest, directory: Path) -> None:
    actual = {engine.get_tensor_name(i) for i in range(engine.num_io_tensors)}
    expected = {tensor.name for tensor in manifest.tensors if tensor.engine == name}
    if actual != expected:
        odd = sorted(actual ^ expected)[0]
        raise EngineError(
            f"the {name} engine in {directory} and its engine.json disagree about the tensor {odd}; "
            "run `vkvx build BUNDLE --force`"
        )
