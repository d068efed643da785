"""Opens the engines in a directory: checks what it was built by, loads plugin and engine files.

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
from vkvx.runtime.engines.library import REBUILD, TensorRTLibrary, load, load_engine
from vkvx.runtime.engines.log import Log
from vkvx.runtime.engines.manifest import DECODER, VISION, EngineManifest

_loaded_plugins: dict[str, str] = {}
"""SHA-256 of each plugin library that this process has loaded, by the backend it was registered for: a registry
takes no plugin twice."""


@dataclass(frozen=True)
class Engines:
    """The engines of a bundle, ready for contexts. Engines go before the runtime, it before its log: fields are freed
    in this order."""

    directory: Path
    manifest: EngineManifest
    decoder: Any
    vision: Any
    runtime: Any
    library: TensorRTLibrary
    log: Log

    def context(self, engine: Any, profile: int, device: Device) -> Any:
        """A new execution context with a profile. It has memory of its own: as much as the profile needs, or, before
        TensorRT 10, the largest one."""
        strategies = getattr(self.library.module, "ExecutionContextAllocationStrategy", None)
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


def open_engines(
    directory: Path, manifest: EngineManifest, *, verify: bool = True, progress: Progress | None = None
) -> Engines:
    """Load the engines of a directory for the GPU that is the calling thread's current one.

    ``verify`` compares the SHA-256 of all files; that of the plugin library, whose code is run, is always compared.
    Raises EngineError (damaged, built by another TensorRT), DependencyError (no TensorRT).
    """
    library = load(manifest.backend, has_gpu=True)
    check_version(manifest, library.version, directory)
    if verify:
        manifest.verify(directory, progress)
    log = Log(library.module)
    if not library.is_recent:  # some of its layers are plugins of its own
        library.module.init_libnvinfer_plugins(log.logger, "")
    _load_plugin(library, manifest, directory, log)
    runtime = library.module.Runtime(log.logger)
    if manifest.options.get("version_compatible"):
        runtime.engine_host_code_allowed = True
    decoder, vision = (load_engine(runtime, log, directory / manifest.engines[name].file) for name in (DECODER, VISION))
    for name, engine in ((DECODER, decoder), (VISION, vision)):
        _check_tensors(name, engine, manifest, directory)
    return Engines(directory, manifest, decoder, vision, runtime, library, log)


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


def _load_plugin(library: TensorRTLibrary, manifest: EngineManifest, directory: Path, log: Log) -> None:
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
            f"{plugin.sha256[:12]}...); {REBUILD}"
        )
    loaded = _loaded_plugins.get(library.backend)
    if loaded == digest:
        return
    if loaded is not None:
        raise EngineError(
            f"this process has loaded another plugin than {path}; open these engines in a process of their own, or "
            "build all engines with one vkvx"
        )
    library.load_plugin(library.module, log, path, EngineError, REBUILD)
    _loaded_plugins[library.backend] = digest


def _check_tensors(name: str, engine: Any, manifest: EngineManifest, directory: Path) -> None:
    actual = {engine.get_tensor_name(i) for i in range(engine.num_io_tensors)}
    expected = {tensor.name for tensor in manifest.tensors if tensor.engine == name}
    if actual != expected:
        odd = sorted(actual ^ expected)[0]
        raise EngineError(
            f"the {name} engine in {directory} and its engine.json disagree about the tensor {odd}; {REBUILD}"
        )
