"""The layers of a built engine, which TensorRT tells on a GPU that the engine was built for."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from vkvx.errors import EngineError, VkvxError
from vkvx.runtime.engines.gpus import list_gpus, use_gpu
from vkvx.runtime.engines.library import REBUILD, TensorRTLibrary, load, load_engine
from vkvx.runtime.engines.log import Log
from vkvx.runtime.engines.manifest import EngineManifest


def engine_layers(manifest: EngineManifest, directory: Path, file: str) -> tuple[list[Any], str | None]:
    """Layers after fusion, as the engine inspector describes them; or none, and why."""
    gpu = next((one for one in list_gpus() if one.compute_capability in manifest.compute_capabilities), None)
    if gpu is None:
        return [], f"layers are shown on a GPU of compute capability {', '.join(manifest.compute_capabilities)} only"
    try:
        library = load(manifest.backend, has_gpu=True)
        if library.version != manifest.library_version:
            name, other = manifest.backend, manifest.library_version
            return [], f"layers are shown with {name} {other} only, here is {library.version}"
        use_gpu(gpu)
        return _inspect(library, manifest, directory, file), None
    except VkvxError as error:
        return [], str(error)


def _inspect(library: TensorRTLibrary, manifest: EngineManifest, directory: Path, file: str) -> list[Any]:
    module, log = library.module, Log(library.module)
    runtime = module.Runtime(log.logger)
    if manifest.plugin is not None and manifest.plugin.embedded:
        runtime.engine_host_code_allowed = True
    elif manifest.plugin is not None:
        library.load_plugin(runtime, log, directory / manifest.plugin.file, EngineError, REBUILD)
    engine = load_engine(runtime, log, directory / file)
    text = engine.create_engine_inspector().get_engine_information(module.LayerInformationFormat.JSON)
    return list(json.loads(text).get("Layers", []))
