"""The layers of a built engine, which TensorRT tells on a GPU that the engine was built for."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from vkvx.errors import VkvxError
from vkvx.plugins.build import native_architectures
from vkvx.runtime.engines.library import Library, load
from vkvx.runtime.engines.manifest import EngineManifest


def engine_layers(manifest: EngineManifest, directory: Path, file: str) -> tuple[list[Any], str | None]:
    """Layers after fusion, as the engine inspector describes them; or none, and why."""
    native = {f"{name[:-1]}.{name[-1]}" for name in native_architectures()}
    if not native & set(manifest.compute_capabilities):
        return [], f"layers are shown on a GPU of compute capability {', '.join(manifest.compute_capabilities)} only"
    try:
        library = load(manifest.backend, has_gpu=True)
    except VkvxError as error:
        return [], str(error)
    if library.version != manifest.library_version:
        return (
            [],
            f"layers are shown with {manifest.backend} {manifest.library_version} only, here is {library.version}",
        )
    return _inspect(library, manifest, directory, file)


def _inspect(library: Library, manifest: EngineManifest, directory: Path, file: str) -> tuple[list[Any], str | None]:
    module, logger = library.module, library.logger()
    runtime = module.Runtime(logger)
    if manifest.plugin is not None and manifest.plugin.embedded:
        runtime.engine_host_code_allowed = True
    elif manifest.plugin is not None:
        library.registry(runtime).load_library(str((directory / manifest.plugin.file).resolve()))
    engine = runtime.deserialize_cuda_engine((directory / file).read_bytes())
    if engine is None:
        return [], f"{library.name} does not load {file}: {logger.first_error or 'it does not say why'}"
    text = engine.create_engine_inspector().get_engine_information(module.LayerInformationFormat.JSON)
    return list(json.loads(text).get("Layers", [])), None
